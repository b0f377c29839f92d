import os
import time

import pytest
import torch

import woodfisher as wf
from woodfisher.files import check_folder, save_json, write_folder, write_whole
from woodfisher.memory import (
    Budget,
    available_memory,
    format_bytes,
    parse_bytes,
    peak_memory,
    resident_memory,
)
from woodfisher.pruning.report import Layer
from woodfisher.results.plots import plot_accuracy, plot_layers


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "results"
    write_folder(folder, {"a.json": lambda path: save_json({"a": 1}, path)})

    def fail(path):
        path.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(folder, {"a.json": lambda path: save_json({"a": 2}, path), "b": fail})
    assert [p.name for p in folder.parent.iterdir()] == ["results"]
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("a.json", '{\n  "a": 1\n}\n')]


def test_what_a_killed_process_had_drafted_goes_with_the_next_results(tmp_path):
    (tmp_path / ".draft").mkdir()
    (tmp_path / ".draft" / "model").write_text("half")
    write_folder(tmp_path, {"a": lambda path: path.write_text("whole")})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_picture_that_fails_costs_no_results(tmp_path):
    def draw(path):
        path.write_text("half")
        raise ValueError("no such symbol")

    (tmp_path / "b.png").write_text("of an earlier run")
    with pytest.warns(
        wf.WoodfisherWarning, match="b.png could not be drawn, and is left out: ValueError: no such"
    ):
        write_folder(tmp_path, {"a": lambda path: path.write_text("whole")}, {"b.png": draw})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "whole")]


def test_names_with_dollars_are_no_mathematics(tmp_path):
    layer = Layer(r"$\frac$.weight", 4, 2)
    plot_layers({"woodfisher": [layer]}, 0.5, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 0


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    def first(draft):
        draft.write_text("first")
        write_whole(tmp_path / "file", lambda other: other.write_text("second"))

    write_whole(tmp_path / "file", first)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "first")]


def test_drafts_of_processes_that_were_killed_go_in_time(tmp_path):
    for name, age in ((".file.0a.part", 10_000), (".file.0b.part", 10), (".other.0a.part", 10_000)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_whole(tmp_path / "file", lambda draft: draft.write_text("whole"))
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".file.0b.part", ".other.0a.part"}


def test_a_file_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "model", tmp_path / ("long" * 100)):
        with pytest.raises(wf.WoodfisherError, match="could not be written"):
            write_whole(path, lambda draft: draft.write_text("whole"))


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "weights", tmp_path / "elsewhere" / "file"
    link.symlink_to(target)
    write_whole(link, lambda draft: draft.write_text("whole"))
    assert link.is_symlink() and target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(wf.WoodfisherError, match="not a folder that can be written to"):
            check_folder(place)
    check_folder(tmp_path / "new" / "deeper")


def test_memory_is_known_and_asked_for():
    free = available_memory(torch.device("cpu"))
    assert free is None or free > 2**20
    budget = Budget.of(torch.device("cpu"))
    budget.check([("a little", 1)], "")
    with pytest.raises(
        wf.WoodfisherError, match=r"this needs .* TiB .*\(rows .* TiB\).*available: take less\.$"
    ):
        budget.check([("rows", 2**60)], "take less")
    tight = Budget.of(torch.device("cpu"), "1KiB", base=1000)
    tight.check([("rows", 24)], "")
    with pytest.raises(
        wf.WoodfisherError, match=r"memory=1 KiB .* has 0.977 KiB .* Give 1.01 KiB or more, or take"
    ):
        tight.check([("rows", 25)], "take less")


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "5000\n", "memory.current": "3000\n"}, 2000),
        (
            {
                "memory.max": "5000\n",
                "memory.current": "3000\n",
                "memory.stat": "anon 700\ninactive_file 400\nactive_file 90\n",
                "memory/memory.limit_in_bytes": "1\n",
                "memory/memory.usage_in_bytes": "0\n",
            },
            2400,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "5000\n",
                "memory/memory.usage_in_bytes": "3000\n",
                "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 400\n",
            },
            2400,
        ),
        ({"memory.max": "max\n", "memory.current": "3000\n"}, None),
        (
            {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n", "memory/memory.usage_in_bytes": "3000\n"},
            None,
        ),
        ({}, None),
    ],
)
def test_the_limit_of_a_control_group_counts_without_files_that_are_only_cached(
    files, left, tmp_path, monkeypatch
):
    monkeypatch.setattr("woodfisher.memory._CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    free = available_memory(torch.device("cpu"))
    assert free == left if left is not None else free is None or free > 2**20


@pytest.mark.parametrize(
    ("own", "groups", "left"),
    [
        ("0::/job/step\n", {"job/step": ("max", 10), "job": (5000, 3000)}, 2000),
        ("0::/job/step\n", {"job/step": (900, 100), "job": (5000, 3000)}, 800),
        ("0::/elsewhere\n", {"": (700, 100), "job": (5000, 4900)}, 600),
        (
            "5:cpu:/x\n4:memory:/a:b\n0::/\n",
            {"memory/a:b": (5000, 3000), "memory": (2**63 - 4096, 9)},
            2000,
        ),
    ],
)
def test_the_limit_of_a_control_group_counts_wherever_it_stands(own, groups, left, tmp_path, monkeypatch):
    monkeypatch.setattr("woodfisher.memory._CGROUP", tmp_path / "groups")
    monkeypatch.setattr("woodfisher.memory._GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    for name, (most, used) in groups.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        first = name.startswith("memory")
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{most}\n")
        (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used}\n")
    assert available_memory(torch.device("cpu")) == left


def test_a_system_that_tells_nothing_of_memory_is_no_error(tmp_path, monkeypatch):
    for table in ("_MEMINFO", "_STATUS"):
        monkeypatch.setattr(f"woodfisher.memory.{table}", tmp_path / "table")
    for text in (None, "Name: python\n"):
        if text:
            (tmp_path / "table").write_text(text)
        assert available_memory(torch.device("cpu")) is None
        assert (resident_memory(torch.device("cpu")), peak_memory()) == (0, 0)


def test_what_torch_holds_of_a_gpu_and_does_not_use_is_available(monkeypatch):
    for name, value in {
        "mem_get_info": (100, 1000),
        "memory_reserved": 900,
        "memory_allocated": 300,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert available_memory(torch.device("cuda")) == 700


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 1023, 123_456, 2**30 - 1, 2**40 + 1, 7 * 10**15])
def test_what_is_said_to_be_enough_is(size):
    assert size <= parse_bytes(format_bytes(size, enough=True)) <= 1.01 * size + 1


def test_pictures_are_drawn(tmp_path):
    layers = [Layer("conv.weight", 100, 30), Layer("fc.weight", 200, 2)]
    plot_layers({"woodfisher": layers, "magnitude": layers}, 0.89, tmp_path / "layers.png")
    plot_accuracy(
        {"a": [(0.5, 90.0, None), (0.9, 70.0, 1.5)]}, 95.0, "accuracy, %", tmp_path / "accuracy.png"
    )
    for name in ("layers.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
