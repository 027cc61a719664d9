"""A plan for this machine's CPU keeps within what the process may have of its memory."""

import sys
from pathlib import Path

import pytest
import torch

import lightning_memopt as memopt
from lightning_memopt.planning import host_limits
from lightning_memopt.planning import plan as planning
from lightning_memopt.planning.host_limits import host_limit_bytes
from tests.planning.a_cpu import A_CPU
from tests.planning.test_plan import Deep, _batch


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which Linux can")
def test_a_limited_address_space_leaves_what_is_not_in_use(monkeypatch):
    import resource

    monkeypatch.setattr(host_limits, "_control_groups", list)
    assert host_limit_bytes() is None
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 8 * 2**30, before[1]))
    try:
        left = host_limit_bytes()
        held = torch.empty(2**30, dtype=torch.uint8)
        assert host_limit_bytes() == pytest.approx(left - held.nbytes, abs=2**22)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 7.5 * 2**30 < left < 8 * 2**30


@pytest.mark.parametrize(
    ("says", "folder", "name"),
    [
        ("0::/jobs/one", "jobs/one", "memory.max"),
        ("0::/jobs/one", "jobs", "memory.max"),  # of all steps of a job
        ("0::/seen/from/outside", ".", "memory.max"),  # of a container that has its own group mounted as the root
        ("7:cpu,memory:/jobs/one", "memory/jobs/one", "memory.limit_in_bytes"),  # version 1
    ],
)
def test_the_limits_of_a_container_are_read_from_its_control_groups(says, folder, name, tmp_path):
    own, mount = tmp_path / "cgroup", tmp_path / "mount"
    own.write_text(f"3:pids:/other\n{says}\n")
    (mount / folder).mkdir(parents=True)
    (mount / folder / name).write_text("4194304\n")
    assert list(host_limits._control_groups(own, mount)) == [4194304]
    (mount / folder / name).write_text("max\n")
    assert list(host_limits._control_groups(own, mount)) == []
    assert list(host_limits._control_groups(tmp_path / "no Linux", mount)) == []


def test_a_plan_without_a_budget_keeps_within_the_limits_of_this_process_and_not_of_another_device(monkeypatch):
    monkeypatch.setattr(planning, "this_device", lambda: A_CPU)
    monkeypatch.setattr(planning, "host_limit_bytes", lambda: 2**20)
    assert memopt.plan(Deep(), _batch()).budget_bytes == 2**20
    assert memopt.plan(Deep(), _batch(), budget="2MiB").budget_bytes == 2**21
    assert memopt.plan(Deep(), _batch(), device=A_CPU).budget_bytes == A_CPU.memory_bytes
    monkeypatch.setattr(planning, "host_limit_bytes", lambda: None)
    assert memopt.plan(Deep(), _batch()).budget_bytes == A_CPU.memory_bytes
