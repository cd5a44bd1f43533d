"""Whether a trace tells the truth about a block: its own code is run beside the trace, and the two compared.

What a regulator takes from the trace is little, since the block's own code goes on to run: where memory is
read and written, and which activation leaves the map at the write point as it is. A block whose code does
not pass these points is refused; where a trace and the code differ otherwise, as on a branch that a symbol
decides in its own way, the fusion goes without an activation, which is the identity for every map.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from ..schema.plan import Skipped
from ..schema.text import located
from ..utils.modes import in_mode
from ..utils.paths import is_inside, relative
from .dataflow import Dataflow, entering
from .measure import Measured, Observed, agree, measure
from .observe import observe, with_regulators
from .provenance import origin
from .site import Site
from .trace import trace

DISTURBED = (
    "its code, or that of what runs it, goes over submodules, parameters or the state dict, and would take a "
    "regulator for one of its own, or asks for a module's exact type, of which regulate makes a subclass"
)


def checked(kinds: Sequence[Site | Skipped], measured: Measured, in_training: Measured | None) -> list[Site | Skipped]:
    """Refuse sites whose points the network's own code does not pass; drop activations that are in doubt.

    Args:
        kinds: what was found in a trace; what is skipped stays so.
        measured: a run of the trace.
        in_training: its run in train mode; None if the network refuses that.
    """
    sites = [kind for kind in kinds if isinstance(kind, Site)]
    if not sites:
        return list(kinds)
    try:
        with torch.no_grad():
            ran = _run(sites, measured)
    except Exception as error:
        reason = f"its own code cannot be run beside its trace: {located(error)}"
        return [Skipped(kind.block.name, reason) if isinstance(kind, Site) else kind for kind in kinds]
    trained = _trained(sites, in_training)
    return [_verdict(kind, measured, ran, trained) if isinstance(kind, Site) else kind for kind in kinds]


@dataclass(frozen=True)
class _Ran:
    """What a run of the network's own code told.

    Args:
        seen: the run.
        disturbed: the modules in whose own code something else ran once the blocks had a regulator among their
            submodules.
        doubtful: the blocks of whose activation nothing is known, by name.
    """

    seen: Observed
    disturbed: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)


def _run(sites: Sequence[Site], measured: Measured) -> _Ran:
    """Run the code with regulators in the blocks; without them as well, unless it is the trace that ran, all of it."""
    points, homes = _points(sites), [_home(site) for site in sites]
    try:
        with with_regulators(measured.traced.root, homes, points):
            held = observe(measured, points, homes)
    except Exception:
        return _Ran(observe(measured, points, homes), set(homes))
    if agree(measured, held, "") and not held.constants:
        return _Ran(held)
    seen = observe(measured, points, homes)
    pairs = ((seen.operators, held.operators), (seen.constants, held.constants))
    return _Ran(seen, {scope for a, b in pairs for scope in {*a, *b} if a.get(scope) != b.get(scope)})


def _points(sites: Sequence[Site]) -> list[str]:
    paths = [relative(path, site.root) for site in sites for path in (site.block.read, site.block.write)]
    return list(dict.fromkeys(paths))


def _home(site: Site) -> str:
    return relative(site.block.name, site.root)


def _verdict(site: Site, measured: Measured, ran: _Ran, trained: _Ran | None) -> Site | Skipped:
    reason = _missed(site, ran.seen) or _disturbed(site, ran) or (trained and _wrong_in_training(site, trained))
    if reason:
        return Skipped(site.block.name, f"{reason} {_location(site)}".rstrip())
    if trained is None or site.block.name in trained.doubtful or not agree(measured, ran.seen, _home(site)):
        return replace(site, block=replace(site.block, activation="none"))
    return site


def _missed(site: Site, seen: Observed) -> str:
    """Why the block's own code does not do what the trace says of its points; empty if it does."""
    block, flow = site.block, site.flow
    for path, node in zip((block.read, block.write), site.found.points, strict=True):
        passes = seen.passes[relative(path, site.root)]
        if len(passes) != 1:
            return f"in its trace it calls {path} once, in a real run {len(passes)} times"
        if passes[0][1] != flow.shape(entering(node)):
            return f"in its trace {path} takes a map {flow.shape(entering(node))}, in a real run {passes[0][1]}"
    return _out_of_order(site, seen, "a real run")


def _out_of_order(site: Site, seen: Observed, when: str) -> str:
    read, write = (seen.passes[relative(path, site.root)] for path in (site.block.read, site.block.write))
    if write and (not read or write[0][0] < read[0][0]):
        return f"in {when} it calls {site.block.write} before {site.block.read}"
    return ""


def _wrong_in_training(site: Site, trained: _Ran) -> str:
    """Return the same for train mode, where a block may also leave early."""
    times = len(trained.seen.passes[relative(site.block.write, site.root)])
    if times > 1:
        return f"in train mode it calls {site.block.write} {times} times in one pass"
    return _out_of_order(site, trained.seen, "train mode") or _disturbed(site, trained)


def _disturbed(site: Site, ran: _Ran) -> str:
    home = _home(site)
    return DISTURBED if any(is_inside(scope, home) or is_inside(home, scope) for scope in ran.disturbed) else ""


def _location(site: Site) -> str:
    """File and line of a block's forward, where there is a text of it."""
    with suppress(AttributeError):
        code = inspect.unwrap(type(site.flow.traced.root.get_submodule(_home(site))).forward).__code__
        return f"({code.co_filename}:{code.co_firstlineno})"
    return ""


def measure_trained(measured: Measured) -> Measured | None:
    """Run a trace again in train mode with gradients, at an odd size if it can be; None where the model refuses it."""
    made, inputs = measured.traced, measured.inputs
    with in_mode(made.root, True), torch.enable_grad():
        for tried in (inputs.odd() or inputs, inputs):
            with suppress(Exception):
                return measure(trace(made.root, tried, sized=True) if made.sized else made, tried)
    return None


def _trained(sites: Sequence[Site], measured: Measured | None) -> _Ran | None:
    """Return what a run in train mode with gradients tells, and of which blocks it differs; None if there is none."""
    if measured is None:
        return None
    with in_mode(measured.traced.root, True), torch.enable_grad():
        try:
            ran = _run(sites, measured)
        except Exception:
            return None
        # A sized trace was made anew, in train mode, and may hold another activation.
        differing = [site for site in sites if measured.traced.sized or not agree(measured, ran.seen, _home(site))]
        return replace(ran, doubtful=_unexplained(differing, measured) if differing else set())


def _unexplained(differing: Sequence[Site], before: Measured) -> set[str]:
    """Those that differ from a trace made in train mode as well, or whose activation is another one there."""
    try:
        again = trace(before.traced.root, before.traced.inputs, before.traced.sized)
        measured = measure(again, before.inputs)
        seen = observe(measured, (), [_home(site) for site in differing])
    except Exception:
        return {site.block.name for site in differing}
    flow = Dataflow(measured)
    writes = {str(node.target): node for node in again.graph.nodes if node.op == "call_module"}
    unexplained = set()
    for site in differing:
        write = writes.get(str(site.found.points[1].target))
        same = write is not None and agree(measured, seen, _home(site))
        if not same or origin(flow, entering(write), write).fixed_point != site.block.activation:  # type: ignore[arg-type]
            unexplained.add(site.block.name)
    return unexplained
