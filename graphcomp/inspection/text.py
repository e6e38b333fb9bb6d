"""An inspection as tables and totals, and the words that the picture uses, too."""

import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphcomp.inspection.inspection import Group, Inspection


def render(inspection: Inspection, console: Console) -> None:
    """Print the groups in graph order, what is pinned by reason, and the totals; 100 columns are enough."""
    console.print(_groups_table(inspection, min(console.width, 120)))
    if inspection.pinned:
        console.print(_pinned_table(inspection))
    console.print(Text(describe_inputs(inspection)))
    console.print(Text(describe_totals(inspection)))


def _groups_table(inspection: Inspection, width: int) -> Table:
    caption = "params, MACs: what sits on the group's channels; a weight between two groups counts for both"
    table = Table(
        title=Text(f"{inspection.model}: coupled channels"),
        caption=Text(caption, style="dim"),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        width=width,
    )
    for name in ("#", "channels", "params", "MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, ratio in (("made by", 5), ("read by", 4), ("why", 5)):
        table.add_column(name, overflow="fold", ratio=ratio)
    total = inspection.totals
    for group in inspection.groups:
        producers = [layer + tied(group, layer) for layer in group.producers]
        table.add_row(
            str(group.number),
            str(group.channels),
            _percent(group.params, total.params_trainable),
            _percent(group.macs, total.macs),
            Text(some(producers) or "(sum)"),
            Text(some([ending(layer, 20) for layer in group.readers], 1)),
            Text(why(group), style="bold" if group.pinned else ""),
        )
    return table


def _pinned_table(inspection: Inspection) -> Table:
    table = Table(title=Text("pinned: these channels stay"), box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("reason", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("groups", overflow="fold")
    table.add_column("at", overflow="fold")
    name = {group.number: group.name for group in inspection.groups}
    for row in inspection.pinned:
        groups = [f"#{number} {name[number]}" for number in row.groups]
        table.add_row(Text(row.reason), str(row.channels), Text(some(groups)), Text(some(row.nodes)))
    return table


def describe_inputs(inspection: Inspection) -> str:
    """The inputs by name, in one line, without the batch."""
    pairs = zip(inspection.input_names, inspection.input_shapes, strict=True)
    shapes = (f"{name} {'x'.join(map(str, shape[1:])) or 'a number'}" for name, shape in pairs)
    return f"{'inputs' if len(inspection.input_names) > 1 else 'input'}: {', '.join(shapes)}"


def describe_totals(inspection: Inspection) -> str:
    """The counters of the whole program in two lines."""
    total = inspection.totals
    removable = sum(group.removable for group in inspection.groups)
    derived = f", {total.channels_derived} sums of padded joins" if total.channels_derived else ""
    return (
        f"{total.params_trainable:,} trainable params ({total.params_state:,} with buffers), "
        f"{total.macs:,} MACs a sample\n"
        f"{total.channels_removable:,} channels removable in {counted(removable, 'group')}, "
        f"{total.channels_pinned:,} pinned{derived}"
    )


def why(group: Group) -> str:
    """Why a group stays, or what couples it, in one line."""
    if group.pinned is not None:
        return f"pinned: {group.pinned.reason} at {group.pinned.node}"
    nodes = coupling_nodes(group)
    return how_coupled(group) + some(nodes) if nodes else "alone"


def tied(group: Group, layer: str) -> str:
    """How many outputs of a layer its channels are, where it is not one each."""
    outputs = group.producers.get(layer, group.channels)
    return "" if outputs == group.channels else f" ({outputs:,} outputs)"


def how_coupled(group: Group) -> str:
    """The words before the nodes that couple a group."""
    return "sum at " if group.derived else "coupled by "


def coupling_nodes(group: Group) -> list[str]:
    """The nodes that couple a group, each with a word on what it is where its name does not say so."""
    found = []
    for coupling in group.coupled_by:
        tail = re.search(r"\((\w+)\)$", coupling.what)
        word = tail[1] if tail else coupling.what.split()[0]
        found.append(coupling.node if coupling.node.startswith(word) else f"{coupling.node} ({word})")
    return found


def some(names: Sequence[str], most: int = 2) -> str:
    """The first names of a list and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" +{more} more" if more > 0 else "")


def fitting(names: Sequence[str], width: int) -> str:
    """As many names as `width` characters take (one at least), and how many more there are."""
    fits = [most for most in range(1, len(names) + 1) if len(some(names, most)) <= width]
    return some(names, max(fits, default=1))


def beginning(text: str, most: int) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def ending(path: str, most: int) -> str:
    """The end of a long module path, where paths differ; cut at a dot if there is one."""
    if len(path) <= most:
        return path
    end = path[1 - most :]
    whole = end.partition(".")[2]
    return "\N{HORIZONTAL ELLIPSIS}" + (whole if 2 * len(whole) > most else end)


def counted(number: int, noun: str) -> str:
    """A number of things, in the plural unless it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
