"""A device model of round numbers, so that plans do not depend on the machine that tests run on."""

from lightning_memopt.planning.devices import DeviceModel, Link

_LINK = Link(latency=1e-4, bandwidth=1e9)

A_CPU = DeviceModel(
    name="a cpu",
    kind="cpu",
    memory_bytes=2**30,
    matmul_flops={"float32": 5e10},
    memory_bandwidth=1e10,
    host_link=1e9,
    granularity=1,
    workspace_bytes=0,
    operator_overhead=5e-6,
    links={"intra": _LINK, "inter": _LINK},
    source="a test",
    date="2026-01-01",
)
