"""The timeline draws its rectangles at their rows, names what fits and shows the curves below."""

from megatron_ext.reports.timeline import Block, Kind, timeline_chart

KIND = Kind(name="busy", colour="#123456", text_colour="white")


def _block(begin: float, end: float, rows: range, *labels: str) -> Block:
    return Block(begin=begin, end=end, rows=rows, kind=KIND, labels=labels)


def test_the_longest_label_that_fits_is_written() -> None:
    blocks = [
        _block(0, 900, range(2), "a long label", "long"),
        _block(900, 1000, range(3), "another label", "no"),
    ]
    picture = timeline_chart(blocks, [("wide", 0, 900), ("too narrow for this", 900, 1000)], y_label="row")
    assert ">a long label</text>" in picture
    assert ">no</text>" in picture
    assert not [text for text in (">long<", ">another label<", ">too narrow for this<") if text in picture]
    assert picture.count("fill: #123456") >= 3, "two rectangles and the legend"
    assert ">busy</text>" in picture


def test_curves_below_are_optional() -> None:
    bands = [("only", 0.0, 10.0)]
    block = _block(0, 10, range(1), "x")
    curve = ([1, 10], [2.0, 1.0])
    with_both = timeline_chart([block], bands, y_label="row", line=("fine", curve), points=("dots", curve))
    assert ">fine</text>" in with_both
    assert ">dots</text>" in with_both
    assert ">fine</text>" not in timeline_chart([block], bands, y_label="row")
