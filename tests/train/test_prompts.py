"""Prompts against TRL's own preparation, and what a GRPO run refuses before its first step."""

from types import SimpleNamespace

import pytest
import torch
from test_data import CALL, CHATML, TOOL, tokenizer, trl_template, turns, write
from trl import GRPOTrainer

from models import load
from train import config, data, rollouts
from train.config import Data

TEXTS = ["What is 48/2?", "Ends with a space ", " and begins with one", "x" * 40, "\n🎉\n", "שלום <|im_end|> a"]
CHATS = [
    turns("Hello"),
    turns("2 + 2?", "4", "3 + 3?", system="You are a helpful assistant."),
    turns("שלום", "🎉 مرحبا بالعالم 🎉", "a"),
    turns("Say it again", "It is"),  # an answer that has begun
]
SYSTEM = "Answer in one word 🎉."


def prepare(folder, prompts, tok, **settings):
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(prompts)]
    return data.prepare(write(folder, rows), "train", Data(train="", **settings), tok, "prompts")


def ids_of(rows):
    return [rows.row(i)[0].tolist() for i in range(len(rows))]


def trl_ids(prompts, tok, tools=None, **chat_template_kwargs):
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    vars(trainer).update(processing_class=tok, _is_vlm=False, environment_factories=None, tools=tools, chat_template=None)
    trainer.chat_template_kwargs = chat_template_kwargs
    return trainer._tokenize_prompts(prompts)[0]


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
@pytest.mark.parametrize("bos", [False, True])
def test_text_equals_trl(tmp_path, style, bos):
    tok = tokenizer(style=style, bos=bos)
    rows = prepare(tmp_path, TEXTS, tok)
    assert ids_of(rows) == trl_ids(TEXTS, tok)
    assert not rows.loss_mask.any() and rows.examples[2] == {"prompt": TEXTS[2], "answer": 2}


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen2_5", "qwen3"])
def test_chats_equal_trl(tmp_path, template):
    tok = tokenizer(CHATML if template == "chatml" else trl_template(template), bos=True)
    assert ids_of(prepare(tmp_path, CHATS, tok)) == trl_ids(CHATS, tok)
    plain = [turns(text) for text in TEXTS]
    assert ids_of(prepare(tmp_path, TEXTS, tok, chat=True)) == trl_ids(plain, tok)
    system = [[{"role": "system", "content": SYSTEM}, *prompt] for prompt in plain]
    rows = prepare(tmp_path, TEXTS, tok, chat=True, system_prompt=SYSTEM)
    assert ids_of(rows) == ids_of(prepare(tmp_path, plain, tok, system_prompt=SYSTEM)) == trl_ids(system, tok)
    assert rows.examples[0]["prompt"] == system[0], "reward functions see other prompts than the model"


def test_tools_and_template_settings_equal_trl(tmp_path):
    """Which TRL takes from its arguments, the same for all rows."""
    tok = tokenizer(trl_template("qwen3"))
    rows = [{"prompt": prompt, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}} for prompt in (CALL[:1], CALL[:3])]
    ours = data.prepare(write(tmp_path, rows), "train", Data(train=""), tok, "prompts")
    assert ids_of(ours) == trl_ids([row["prompt"] for row in rows], tok, [TOOL], enable_thinking=False)


def test_long_prompts_are_left_out_and_counted(tmp_path):
    tok = tokenizer()
    lengths = [len(ids) for ids in trl_ids(TEXTS, tok)]
    rows = prepare(tmp_path, TEXTS, tok, max_length=sorted(lengths)[-2])
    longest = lengths.index(max(lengths))
    assert rows.report["kept"] == len(TEXTS) - 1 and rows.report["dropped"] == {"prompt longer than max_length": 1}
    first = rows.report["first_dropped"]["prompt longer than max_length"]
    assert first.endswith(f"rows.jsonl:{longest + 1}: got {max(lengths)} tokens, data.max_length {sorted(lengths)[-2]}")
    assert [e["prompt"] for e in rows.examples] == TEXTS[:longest] + TEXTS[longest + 1 :], "prompts and their columns come apart"
    assert rows.report["truncated"] == 0
    with pytest.raises(ValueError, match=r"all 6 rows were dropped: 6 prompt longer than max_length; first: .*rows\.jsonl:1: got "):
        prepare(tmp_path, TEXTS, tok, max_length=2)


@pytest.mark.parametrize("prompt", ["", " \n", None, 7, []])
def test_what_is_no_prompt_is_refused(prompt, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: (empty prompt|not a string) \(got "):
        prepare(tmp_path, ["fine", prompt], tokenizer())
    assert prepare(tmp_path, ["fine", prompt], tokenizer(), on_bad_row="skip").report["kept"] == 1


def test_system_prompt_of_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not a conversation \(got str .* in prompt, .*; set data\.chat: true\)"):
        prepare(tmp_path, TEXTS, tokenizer(), system_prompt=SYSTEM)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: two system messages \(got data\.system_prompt and one in prompt"):
        prepare(tmp_path, CHATS, tokenizer(), system_prompt=SYSTEM)


# ---- before the first step ---------------------------------------------------------------------------------------------------


@pytest.fixture
def begin(one_rank, model_folder, tmp_path):
    """(rows, settings of grpo and train, held-out rows) -> Rollouts over them."""
    made = []

    def build(rows, grpo=(), train=(), held_out=None):
        folder = model_folder("llama")
        cfg = config.Config(
            str(tmp_path / "run"),
            model=config.Model(folder),
            data=config.Data("rows.jsonl"),
            algorithm="grpo",
            train=config.Train(**dict(train)),
            grpo=config.Grpo(**{"max_completion_length": 8} | dict(grpo)),
        )
        tok = load.load_tokenizer(cfg.model, folder)
        parts = [part and data.prepare(write(tmp_path, part), "train", cfg.data, tok, "prompts") for part in (rows, held_out)]
        rewards = rollouts.start_rewards(cfg, *parts)
        model = load.build(cfg.model, folder, cfg.fsdp, one_rank, 0)
        made.append(rollouts.Rollouts(cfg, None, model, tok, parts[0], rewards, (cfg.train.micro_batch_tokens, 0, 1, 0.0), None))
        return made[-1]

    yield build
    for sampler in made:
        sampler.close()


ROWS = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "longer: 2 + 2", "answer": "4"}]


def test_budget_below_prompt_and_completion_is_refused(begin):
    assert begin(ROWS, train={"micro_batch_tokens": 21})
    message = "^train.micro_batch_tokens: 20 is less than the longest prompt, 13 tokens, and grpo.max_completion_length, 8; raise it$"
    with pytest.raises(ValueError, match=message):
        begin(ROWS, train={"micro_batch_tokens": 20})


@pytest.mark.parametrize("where", ["train", "eval"])
def test_missing_reward_column_is_refused(where, begin):
    """Also one that only data.eval lacks, where every answer would count as wrong."""
    lacking = [{"prompt": row["prompt"], "target": row["answer"]} for row in ROWS]
    rows = {"rows": lacking} if where == "train" else {"rows": ROWS, "held_out": lacking}
    with pytest.raises(ValueError, match=r"^grpo\.reward_funcs: accuracy needs solution or answer, but the data has ") as error:
        begin(**rows)
    assert "\n" not in str(error.value)


def test_columns_that_some_rows_lack_are_none_there(begin, tmp_path):
    (tmp_path / "own.py").write_text(
        "def known(completions, answer, extra):\n    return [None if e is None else float(e) for e in extra]\n"
    )
    rows = [ROWS[0], ROWS[1] | {"extra": 3}]
    sampler = begin(rows, grpo={"reward_funcs": [f"{tmp_path}/own.py:known"]})
    found = sampler.judge(sampler.rows, [0, 1, 1], [[5], [6], [7]])
    assert found.nan_to_num(-1.0).tolist() == [[-1.0], [3.0], [3.0]] and not sampler.rewards.failures


def test_disagreement_with_the_sampler_stops_the_run(begin, capsys):
    sampler = begin(ROWS)
    metrics = {"sampling/sampling_logp_difference/mean": 0.01, "entropy": 1.0}
    sampler.check(1, metrics)
    assert "warning" not in capsys.readouterr().out
    sampler.check(1, metrics | {"entropy": 1e-4, "frac_reward_zero_std": 1.0, "completions/clipped_ratio": 1.0, "rewards/failures": 2})
    assert capsys.readouterr().out.count("step 1: warning: ") == 4
    for difference in (0.2, float("nan")):
        with pytest.raises(ValueError, match=r"^step 1: the log-probs of the sampler and of the trainer differ by "):
            sampler.check(1, metrics | {"sampling/sampling_logp_difference/mean": difference})


def test_ended(begin):
    """Every stop token ends a completion, wherever the limit is."""
    sampler = begin(ROWS)
    sampler.stops = [0, 9]
    ids = torch.tensor([[5, 0, 0], [5, 9, 0], [5, 6, 7], [0, 0, 0], [5, 6, 9]])
    assert sampler.ended(SimpleNamespace(ids=ids, lengths=torch.tensor([2, 2, 3, 1, 3]))).tolist() == [True, True, False, True, True]
