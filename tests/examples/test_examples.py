"""The examples as a reader would run them, and the job files as far as that can be told without a cluster."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from gptoss_jax.cli import main
from gptoss_jax.sharding import MeshShape
from tests.hosts.processes import COMMAND, ROOT, free_port, run_all

MULTI_HOST = ROOT / "examples" / "multi_host"


def test_one_model_on_eight_devices():
    (process,) = run_all([(sys.executable, ROOT / "examples" / "multi_device_generate.py", "--max-new-tokens", 3)])
    assert process.code == 0, process.stderr
    lines = process.stdout.splitlines()
    held = [re.fullmatch(r"(\S+) holds ([\d,]+) bytes", line) for line in lines[:8]]
    assert len({found[1] for found in held if found}) == 8  # each device once
    assert len({found[2] for found in held if found}) == 1  # and all of them as much as each other
    assert lines[8].startswith("The experts of this model lie on")


def test_tools_run_by_a_script():
    (process,) = run_all([(sys.executable, ROOT / "examples" / "tools.py")])
    assert process.code == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "[analysis] I look it up." in lines
    assert "[functions.weather answers] 12 °C" in lines
    assert lines[-1] == "[final] It is 12 degrees in Oslo."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora", r"step 10 .*\n'.*'\nfor PEFT, .*\['adapter_config.json', 'adapter_model.safetensors'\]\n$"),
        ("qlora_mesh", r"(\S+ holds [\d,]+ bytes\n){8}step 1 .*\n\d+ steps\n$"),
        ("dpo", r"^step 1: loss 0.6931, .*\nstep \d+: loss 0.[0-5]\d+, accuracy 1.00\n$"),
        ("full", r"^step 1 .*\nmodel: mxfp4 experts, 4 layers\n$"),
    ],
)
def test_training_from_python(name: str, said: str):
    path = ROOT / "examples" / "train" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    (process,) = run_all([(sys.executable, path)])
    assert process.code == 0, process.stderr
    assert re.search(said, process.stdout, re.DOTALL), process.stdout


@pytest.mark.slow
def test_two_terminals(tmp_path: Path):
    (made,) = run_all([(*COMMAND, "init", tmp_path / "random", "--model", "tiny", "--layers", 2)])
    assert made.code == 0, made.stderr
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where gptoss-jax is installed
    terminal = ("env", f"PATH={path}", f"PORT={free_port()}", MULTI_HOST / "loopback.sh")
    first, second = run_all([(*terminal, i, tmp_path / "random", "--max-new-tokens", 3) for i in range(2)])
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert first.stdout.endswith("\n")
    assert second.stdout == ""


@pytest.mark.parametrize(("name", "chips"), [("gke_tpu.yaml", 4), ("gke_gpu.yaml", 8)])
def test_a_job_file_has_a_chip_for_each_place_of_its_mesh(name: str, chips: int):
    (job,) = yaml.safe_load((MULTI_HOST / name).read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert list(container["resources"]["limits"].values()) == [chips]
    words = [*container["command"], *container["args"]]
    words = shlex.split(words[-1].removeprefix("exec ")) if words[0] == "bash" else words
    mesh = re.search(r"--mesh[= ](\S+)", " ".join(words))
    assert mesh is not None
    assert MeshShape.parse(mesh[1]).num_devices == chips * spec["parallelism"] == chips * spec["completions"]
    (asked,) = run_all([(*COMMAND, *words[1:2], "--help")])
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert flag in asked.stdout


# Flags of Docker, srun, mpirun, gcloud, pip and useradd in the same files.
_OTHERS = {"--rm", "--gpus", "--ipc", "--no-deps", "--no-cache-dir", "--no-build-isolation", "--create-home"} | {
    "--kill-on-bad-exit",
    "--ntasks-per-node",
    "--worker",
    "--command",
}


def test_every_flag_that_is_named_exists(capsys: pytest.CaptureFixture[str]):
    for command in ("init", "generate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = {*re.findall(r"--[a-z-]+", capsys.readouterr().out), *_OTHERS}
    for path in (ROOT / "docs" / "deploy.md", ROOT / "Dockerfile.cuda", *MULTI_HOST.iterdir()):
        text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#SBATCH"))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known, path


def test_a_slurm_job_has_a_gpu_for_each_place_of_its_mesh():
    script = (MULTI_HOST / "slurm.sbatch").read_text()
    nodes, gpus = (int(number) for number in re.findall(r"#SBATCH --(?:nodes|gpus-per-node)=(\d+)", script))
    mesh = re.search(r"--mesh (\S+)", script)
    assert mesh is not None
    assert MeshShape.parse(mesh[1]).num_devices == nodes * gpus
