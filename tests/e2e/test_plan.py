"""`cachalot plan`: what it says of the published config, which is all of the model that it needs, and of mistakes."""

import re
import shutil

import pytest
from conftest import ROOT
from test_process import run


@pytest.fixture
def v3(tmp_path):
    shutil.copy(ROOT / "tests/bench/deepseek_v3.json", tmp_path / "config.json")
    return tmp_path


@pytest.fixture(autouse=True)
def needs_cuda_library(binary):
    if not (binary.parent / "libcachalot_cuda.so").exists():
        pytest.skip("built without the CUDA backend, which counts")


def plan(binary, model, *arguments):
    return run(binary, "plan", "--model", model, *arguments)


def test_a_model_that_fits(binary, v3):
    result = plan(binary, v3, "--gpus", 32, "--gpu-memory", "80GiB", "--context", "128K", "--table")
    assert result.returncode == 0, result.stderr
    assert "671.0B parameters of which a token uses 37.6B, on 32 GPUs of 80 GiB" in result.stdout
    assert "8 of 256 routed experts a layer" in result.stdout
    rows = {int(gpus): words for gpus, words in re.findall(r"^ +(\d+) +(\S.*)$", result.stdout, re.MULTILINE)}
    assert rows[8] == "does not fit" and float(rows[32].split()[1]) == pytest.approx(41.68, rel=0.02)
    rates = [float(rows[n].split()[-1]) for n in (16, 32, 64, 128, 320)]
    assert rates == sorted(rates)


def test_one_that_does_not(binary, v3):
    result = plan(binary, v3, "--gpus", 8, "--gpu-memory", "80GiB")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"cachalot plan: 8 GPUs of 80 GiB: does not fit, needs at least 1\d \(.*\)\n", result.stderr)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpus", "0", "--gpu-memory", "80GiB"], "--gpus"),
        (["--gpus", "8"], "--gpu-memory is required"),
        (["--gpus", "8", "--gpu-memory", "80%"], "--gpu-memory: '80%' is no size"),
        (["--gpus", "8", "--gpu-memory", "much"], "--gpu-memory: 'much' is no size"),
        (["--gpus", "8", "--gpu-memory", "141GB", "--context", "lots"], "--context: 'lots' is no number of tokens"),
        (["--gpus", "8", "--gpu-memory", "141GB", "--context", "200K"], "context: found 204800, expected 1 to the model's 163840"),
    ],
)
def test_mistakes(binary, v3, arguments, words):
    result = plan(binary, v3, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr


def test_no_config(binary, tmp_path):
    result = plan(binary, tmp_path, "--gpus", 8, "--gpu-memory", "141GB")
    assert result.returncode == 1 and "config.json" in result.stderr
