import os
import time

import pytest
import torch

import woodfisher as wf
from woodfisher.files import check_folder, save_json, write_folder, write_whole
from woodfisher.memory import Budget, available_memory, format_bytes, parse_bytes
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
