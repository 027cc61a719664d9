"""Started as users start it: torchrun with restarts, two hosts, SLURM's environment."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import _free_port
from tests.strategies.elastic_training import BATCHES, EPOCHS, STRATEGIES

pytestmark = pytest.mark.slow  # each process imports torch and Lightning

DEADLINE_SECONDS = 150
ACROSS_HOSTS = {"memopt_zero3": 1, "memopt_pp": 1, "pipeline_of_replicas": 2}
"""Rows of ``STRATEGIES`` that are tried on two hosts, and how many ranks each has: stages across, replicas inside."""

SCRIPT = ["-m", "tests.strategies.elastic_training"]
ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    cleared = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return cleared | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | variables


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.run(
        command,
        env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        cwd=ROOT,
        timeout=DEADLINE_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )


def losses_in(folder: Path) -> np.ndarray:
    """Of each step, as it was last computed."""
    lines = (line.split() for line in (folder / "losses").read_text().splitlines())
    losses = {int(step): float(loss) for step, loss in lines}
    assert sorted(losses) == list(range(1, BATCHES * EPOCHS + 1))
    return np.array([losses[step] for step in sorted(losses)])


RESTARTS = [
    *((strategy, rank, "kill") for strategy in STRATEGIES for rank in (0, 1)),
    *((strategy, 1, how) for strategy in ("memopt_zero3", "memopt_pp") for how in ("raise", "hang", "sigterm")),
]
SAID = {"kill": "", "raise": "ValueError: a bad sample", "hang": "computed, read and written nothing"}


@pytest.mark.parametrize(("strategy", "rank", "how"), RESTARTS)
def test_torchrun_restarts_after_a_fault_with_the_losses_of_the_uninterrupted_run(
    strategy: str, rank: int, how: str, tmp_path: Path
) -> None:
    ranks = 4 if strategy == "pipeline_of_replicas" else 2
    usual = [f"--nproc-per-node={ranks}", "--standalone", "--max-restarts=1", *SCRIPT, strategy]
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
    whole = torchrun(*usual, tmp_path / "whole")
    interrupted = torchrun(*usual, tmp_path / "interrupted", "--fail", rank, BATCHES + 2, "--how", how)

    assert whole.returncode == 0, whole.stderr
    assert interrupted.returncode == 0, interrupted.stderr
    if how == "sigterm":
        assert f"Rank {rank} received SIGTERM" in interrupted.stderr, interrupted.stderr
    else:
        # These batches take milliseconds, less than passes between two signs: which was the last is not sure.
        said = rf"Rank {rank} \(host \S+\) failed in .+: .*{SAID[how]}"
        assert re.search(said, interrupted.stderr), interrupted.stderr
    done = (tmp_path / "interrupted" / "losses").read_text().splitlines()
    assert len(done) > BATCHES * EPOCHS, "nothing was done again"
    np.testing.assert_allclose(losses_in(tmp_path / "interrupted"), losses_in(tmp_path / "whole"), rtol=1e-5)


class TwoHosts:
    """Two network namespaces joined by a cable, each with one address that is known in them only."""

    addresses = ("10.231.77.1", "10.231.77.2")

    def __init__(self) -> None:
        self.names = tuple(f"memopt-{os.getpid()}-{number}" for number in range(2))
        self.cables = tuple(f"mo{os.getpid()}x{number}" for number in range(2))

    def __enter__(self) -> "TwoHosts":
        for name in self.names:
            self._ip("netns", "add", name)
        # Both ends made inside, so that nothing appears outside.
        ends = ["name", self.cables[1], "netns", self.names[1]]
        self._ip("-n", self.names[0], "link", "add", self.cables[0], "type", "veth", "peer", *ends)
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            self._ip("-n", name, "addr", "add", f"{address}/30", "dev", cable)
            self._ip("-n", name, "link", "set", cable, "up")
            self._ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, host: int, output: Path, *command: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *map(str, command)],
            env=environment(GLOO_SOCKET_IFNAME=self.cables[host], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=output.open("wb"),
        )

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    made = TwoHosts()
    try:
        made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        made.__exit__()
        pytest.skip(f"network namespaces may not be made here: {getattr(error, 'stderr', None) or error}")
    yield made
    made.__exit__()


def on_both(hosts: TwoHosts, strategy: str, folder: Path, *arguments: object) -> list[tuple[int, str]]:
    """Exit code and stderr of ``torchrun --nnodes 2`` on each host."""
    ranks = f"--nproc-per-node={ACROSS_HOSTS[strategy]}"
    rendezvous = ["--nnodes=2", ranks, "--rdzv-backend=c10d", "--rdzv-id=memopt"]
    endpoint = f"--rdzv-endpoint={hosts.addresses[0]}:29400"
    outputs = [folder / f"host{host}" for host in range(2)]
    running = []
    for host in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, endpoint]
        # Said, since torchrun looks for its own address among those that the name of this machine has.
        launcher += [f"--local-addr={hosts.addresses[host]}", f"--rdzv-conf=is_host={int(host == 0)}"]
        running.append(
            hosts.start(host, outputs[host], *launcher, *SCRIPT, strategy, folder, "--nodes=2", *arguments)
        )
    try:
        codes = [process.wait(DEADLINE_SECONDS) for process in running]
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("strategy", ACROSS_HOSTS)
def test_two_hosts_have_the_losses_of_as_many_ranks_on_one(strategy: str, hosts: TwoHosts, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for code, said in on_both(hosts, strategy, tmp_path / "two"):
        assert code == 0, said
    ranks = 2 * ACROSS_HOSTS[strategy]
    one = torchrun(f"--nproc-per-node={ranks}", "--standalone", *SCRIPT, strategy, tmp_path / "one")

    assert one.returncode == 0, one.stderr
    np.testing.assert_allclose(losses_in(tmp_path / "two"), losses_in(tmp_path / "one"), rtol=1e-5)


@pytest.mark.parametrize("strategy", ["memopt_zero3", "memopt_pp"])
def test_a_rank_killed_on_one_host_ends_the_other_host_with_its_name(
    strategy: str, hosts: TwoHosts, tmp_path: Path
) -> None:
    (other, said), (killed, _) = on_both(hosts, strategy, tmp_path, "--fail", 1, BATCHES + 2)
    assert other != 0 and killed != 0
    assert "Rank 1 (host " in said and "RankFailure" in said, said


def test_slurm_starts_the_ranks_by_its_environment(tmp_path: Path) -> None:
    usual = environment(
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_JOB_ID="4242",
        SLURM_JOB_NAME="training",
        SLURM_NODELIST="127.0.0.1",
        SLURM_NNODES="1",
        SLURM_NODEID="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
    )
    running = [
        subprocess.Popen(
            [sys.executable, *SCRIPT, "memopt_zero3", str(tmp_path)],
            env=usual | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=DEADLINE_SECONDS)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
    losses_in(tmp_path)
