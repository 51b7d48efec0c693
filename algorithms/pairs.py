"""What the losses over pairs share. Rows alternate chosen, rejected: `x[0::2]` and `x[1::2]` are the two sides."""


def counts(batch):
    """Pairs, and trained tokens in all and of each side, of a batch of 2P rows."""
    tokens = batch["loss_mask"].sum(-1)  # (2P,)
    return {
        "pairs": len(tokens) // 2,
        "tokens": tokens.sum(),
        "chosen_tokens": tokens[0::2].sum(),
        "rejected_tokens": tokens[1::2].sum(),
    }


def lengths(batch):
    """Trained tokens of each row (2P,), at least 1 so that a row without any divides nothing by zero."""
    return batch["loss_mask"].sum(-1).clamp(min=1)


def metrics(rewards, seq_logps, batch, totals):
    """TRL's metrics of a preference step; each a sum over what it averages, divided by the step's count of it.

    rewards, seq_logps: (2P,). rewards/accuracies counts the pairs whose chosen reward is strictly higher.
    """
    rewards, seq_logps, mask = rewards.detach(), seq_logps.detach(), batch["loss_mask"]
    chosen, rejected = rewards[0::2], rewards[1::2]  # (P,)
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": seq_logps[0::2],
        "logps/rejected": seq_logps[1::2],
    }
    logits = (batch["mean_logits"] * mask).sum(-1)  # (2P,)
    return {name: value.sum() / totals["pairs"] for name, value in per_pair.items()} | {
        "logits/chosen": logits[0::2].sum() / max(totals["chosen_tokens"], 1),
        "logits/rejected": logits[1::2].sum() / max(totals["rejected_tokens"], 1),
        "entropy": (batch["entropy"] * mask).sum() / max(totals["tokens"], 1),
        "mean_token_accuracy": (batch["is_top1"] * mask)[0::2].sum() / max(totals["chosen_tokens"], 1),
    }
