"""A Slurm cluster of one host, a repository to call scripts in, and the tiny model of the training tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from training.conftest import ROOT, make_config, source  # noqa: F401 (fixtures)

SETUP = Path(__file__).parent / "setup_cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Start a cluster of two nodes for the session; set SLURM_CONF, by which Slurm's commands find it."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and Slurm (apt-get install slurm-wlm munge); missing: {missing or 'root'}")
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run([SETUP, "start", folder], check=True)
            yield folder
        finally:
            subprocess.run(["scancel", "--me"], check=False)
            subprocess.run([SETUP, "stop", folder], check=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The repository's root for scripts: rows and logs that they write lie here, what they read is linked."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "logs").mkdir()
    for scripts in ("sbatch", "experiments/00_baseline/sbatch"):
        shutil.copytree(ROOT / scripts, root / scripts)
    for name in ("fastdllm", "data", "evaluate.py", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    return root
