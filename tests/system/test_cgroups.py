"""The memory of a container, on trees such as Linux shows."""

import pytest

from shardmix.system import cgroups, memory

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", membership)
    monkeypatch.setattr(cgroups, "_ROOT", root)

    def write(lines, **groups):
        membership.write_text("".join(f"{line}\n" for line in lines))
        for folder, files in groups.items():
            place = root.joinpath(*folder.split("__"))
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_text(f"{content}\n")

    return write


def version_2(limit, used=0, cached=0):
    stat = f"anon 1\nfile 7\ninactive_file {cached // 2}\nactive_file {cached // 2}"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def version_1(limit, used=0, cached=0):
    stat = f"cache 7\ninactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0"
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        "memory.stat": stat,
    }


def test_cached_files_do_not_count_as_taken(system):
    system(["0::/job"], job=version_2(4 * GIB, used=3 * GIB, cached=2 * GIB))
    assert cgroups.group_available_nbytes() == 3 * GIB


def test_tightest_nested_group_counts(system):
    """The tightest of groups within groups counts."""
    system(
        ["0::/slice/job"],
        slice=version_2(2 * GIB),
        slice__job=version_2("max"),
    )
    assert cgroups.group_available_nbytes() == 2 * GIB


def test_version_1_has_its_own_names(system):
    system(
        ["4:cpu,cpuacct:/job", "7:memory:/job", "0::/"],
        memory__job=version_1(4 * GIB, used=2 * GIB, cached=1 * GIB),
        memory=version_1((1 << 63) - 4096),
    )
    assert cgroups.group_available_nbytes() == 3 * GIB


def test_hosts_path_is_not_looked_for(system):
    """A path of the host is not looked for in vain.

    Without a namespace of its own, a container sees the host's path but only its own files.
    """
    system(["7:memory:/docker/0123"], memory=version_1(1 * GIB))
    assert cgroups.group_available_nbytes() == 1 * GIB


@pytest.mark.parametrize("lines", [[], ["0::/"], ["7:memory:/job"], ["", "what?", "0::"]])
def test_machine_counts_without_a_limit(system, lines):
    """Without a limit, only the machine counts."""
    system(lines)
    assert cgroups.group_available_nbytes() is None
    assert memory.available_nbytes() > 0


def test_other_systems_have_no_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "none")
    assert cgroups.group_available_nbytes() is None


def test_the_limit_is_what_is_available(system):
    system(["0::/job"], job=version_2(GIB // 1024))
    assert memory.available_nbytes() == GIB // 1024


def test_limit_that_slows_down_counts(system):
    """The limit that slows down counts as well."""
    system(["0::/job"], job=version_2(4 * GIB) | {"memory.high": 3 * GIB})
    assert cgroups.group_available_nbytes() == 3 * GIB
