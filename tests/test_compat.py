"""Scripts written for SGLang run as they are: the example that people paste, its module names, its command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from streamserve.compat.sglang import ABSENT, MODULES
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]

# As it stands in articles about SGLang, but for the model, which is a file here.
EXAMPLE = """\
import sglang as sgl

@sgl.function
def qa_pipeline(s, question):
    s += sgl.system('You are a helpful assistant.')
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen('answer', max_tokens=256))

runtime = sgl.Runtime(model_path=MODEL)
sgl.set_default_backend(runtime)

state = qa_pipeline.run(question='What is RadixAttention?')
print(state['answer'])
"""


def _python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=100, cwd=cwd)


def _compat(script: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    return _python("-m", "streamserve.compat.sglang", "script.py", *arguments, cwd=tmp_path)


@pytest.mark.parametrize("name", ["streamserve", "sglang"])
def test_the_example_that_people_paste_prints_an_answer(name: str, tmp_path: Path) -> None:
    try:
        model = str(find_default_model())
    except CheckpointError as error:
        pytest.skip(str(error))
    script = EXAMPLE.replace("sglang", name).replace("MODEL", repr(model)).replace("256", "12")
    if name == "sglang":
        done = _compat(script, tmp_path)
    else:
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        done = _python("script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5


IMPORTS = """
from sglang import (Anthropic, Engine, OpenAI, Runtime, RuntimeEndpoint, assistant, assistant_begin, assistant_end, flush_cache,
    function, gen, gen_int, gen_string, get_server_info, global_config, greedy_token_selection, image, select,
    separate_reasoning, set_default_backend, system, system_begin, system_end, token_length_normalized,
    unconditional_likelihood_normalized, user, user_begin, user_end, video, __version__)
from sglang.api import gen as gen_2
from sglang.global_config import global_config
from sglang.lang.api import function as function_2, set_default_backend
from sglang.lang.backend.anthropic import Anthropic
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.openai import OpenAI
from sglang.lang.backend.runtime_endpoint import Runtime, RuntimeEndpoint as Endpoint_2
from sglang.lang.choices import greedy_token_selection, token_length_normalized
from sglang.lang.interpreter import ProgramState
from sglang.lang.ir import REGEX_BOOL, REGEX_FLOAT, REGEX_INT, REGEX_STR
from sglang.test.test_utils import add_common_sglang_args_and_parse, select_sglang_backend
from sglang.utils import download_and_cache_file, dump_state_text, launch_server_cmd, print_highlight, read_jsonl
from sglang.utils import terminate_process, wait_for_server
assert gen is gen_2 and function is function_2 and RuntimeEndpoint is Endpoint_2
import sys
assert "torch" not in sys.modules
print(sys.argv[1:], __name__)
"""


def test_names_of_programs_are_found_where_sglang_has_them(tmp_path: Path) -> None:
    every_module = [f"import {name}; assert {name}.__name__ == {name!r}; dir({name})" for name in MODULES]
    done = _compat("\n".join([IMPORTS, *every_module]), tmp_path, "--flag", "value")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['--flag', 'value'] __main__"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        *((f"from sglang import {name}", name) for name in sorted(ABSENT)[:2]),
        ("import sglang.srt.managers", "sglang.srt"),
        ("from sglang import no_such_name", "no_such_name"),
    ],
)
def test_what_is_not_there_is_an_import_error_that_says_so(line: str, words: str, tmp_path: Path) -> None:
    done = _compat(line, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "Error" in last and words in last


SPAWNING = """\
import multiprocessing, os, sys
import sglang

class Question:
    text = "why?"

def asked(question):
    return sglang.gen.__module__, type(question) is Question, question.text, sys.argv

if __name__ == "__main__":
    os.chdir("/")
    with multiprocessing.get_context(METHOD).Pool(1) as pool:
        print(pool.map(asked, [Question()]))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_a_script_starts_know_the_name_too(method: str, tmp_path: Path) -> None:
    done = _compat(SPAWNING.replace("METHOD", repr(method)), tmp_path, "x")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('streamserve.lang.expressions', True, 'why?', ['script.py', 'x'])]"


def test_a_module_is_run_by_its_name(tmp_path: Path) -> None:
    package = tmp_path / "tool"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "__main__.py").write_text("import sglang, sys; print(sglang.gen.__module__, sys.argv[1:])", encoding="utf-8")
    done = _python("-m", "streamserve.compat.sglang", "-m", "tool", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].startswith("streamserve.")
    assert done.stdout.strip().endswith("['x']")


def test_a_scripts_exit_code_is_its_own(tmp_path: Path) -> None:
    assert _compat("import sys; sys.exit(7)", tmp_path).returncode == 7
    done = _compat("def f():\n    raise ValueError(1)\nf()", tmp_path)
    assert done.returncode == 1
    assert [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("  File")] == ['  File "script.py"'] * 2
    assert _python("-m", "streamserve.compat.sglang", "nowhere.py", cwd=tmp_path).returncode == 1
    bench = _python("-m", "streamserve.compat.sglang", "-m", "sglang.bench_serving", cwd=tmp_path)
    assert (bench.returncode, bench.stderr.count("\n")) == (1, 1) and "streamserve bench serve" in bench.stderr
