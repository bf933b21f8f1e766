"""How many cores there are for this process."""

import math
import os

import pytest

from pyrosc.engine.cpu import cores
from pyrosc.engine.cpu.cores import _quota, n_cores

FILES = {
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "250000 100000\n", "cpu.max": "max 100000\n"}, 2.5),
    "of a group around it": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"},
        0.5,
    ),
    "inside a container": ("0::/far/away\n", {"cpu.max": "300000 100000\n"}, 3.0),
    "version 1": (
        "3:memory:/m\n2:cpu,cpuacct:/a\n0::/\n",
        {"cpu/a/cpu.cfs_quota_us": "150000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        1.5,
    ),
    "version 1 without": (
        "2:cpu:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        math.inf,
    ),
    "none": ("2:memory:/a\n", {}, math.inf),
}


@pytest.mark.parametrize("case", FILES)
def test_the_quota_of_control_groups(case, tmp_path):
    names, files, expected = FILES[case]
    (tmp_path / "own").write_text(names)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert _quota(tmp_path / "groups", tmp_path / "own") == expected


def test_no_quota_on_other_systems(tmp_path):
    assert _quota(tmp_path, tmp_path / "absent") == math.inf


def test_cores_are_the_fewest_of_affinity_and_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5, 7}, raising=False)
    for granted, expected in [(math.inf, 4), (8.0, 4), (2.5, 3), (0.1, 1)]:
        monkeypatch.setattr(cores, "_quota", lambda granted=granted: granted)
        assert n_cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(cores, "_quota", lambda: math.inf)
    assert n_cores() == 3
