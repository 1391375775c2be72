"""The picture of a plan of reuse."""

from __future__ import annotations

from qncd_cli.cli.reuse import WIDTH, computed, picture


def body(chains, kept):
    return {"chains": chains, "kept": kept, "share": 0.5}


NESTED = body([["wide", "narrow"]], [[], ["wide"], ["narrow"], []])


def test_what_lies_outside_of_a_kept_site_is_computed():
    assert computed(NESTED) == {
        "wide": [True, False, True, True],
        "narrow": [True, False, False, True],
    }


def test_sites_that_lie_apart_are_kept_alone():
    found = computed(body([["a"], ["b"]], [[], ["b"], ["a"]]))
    assert found == {"a": [True, True, False], "b": [True, False, True]}


def test_the_picture_has_a_line_a_site_and_a_column_a_step():
    lines = picture(NESTED)
    assert lines[0].startswith("reuse: 50% of the denoiser's MACs")
    assert lines[2:] == ["wide    #.##", "narrow  #..#"]


def test_many_steps_go_on_below_within_the_width():
    name = "up_blocks.3.resnets.2"
    lines = picture(body([[name]], [[]] + [[name] if s % 2 else [] for s in range(1, 120)]))
    assert all(len(line) <= WIDTH for line in lines)
    marks = "".join(line.split()[1] for line in lines if line.startswith(name))
    assert marks == "".join("#."[s % 2] for s in range(120))
    assert lines[1].endswith("1         2         3         4         5")
