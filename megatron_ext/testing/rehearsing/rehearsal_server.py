"""A server process that has the simulated device and has imported the engine; each rehearsal runs in a fork of it.

`rehearsals` starts the server, which reads one request per line and answers each with the line `done`.
"""

import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from megatron_ext.rehearsal import rehearsed_rank
from megatron_ext.rehearsal.recording.recorder import Recorder
from megatron_ext.rehearsal.report import Rehearsal, oddities
from megatron_ext.rehearsal.simulated.devices import device_named
from megatron_ext.testing.rehearsing.rehearsals import Rehearsed


def main() -> None:
    """Serves requests until standard input ends."""
    recorder = rehearsed_rank.simulate(device_named("H100", None))
    import megatron_ext.npt.runs.npt_run
    import megatron_ext.per_layer.per_layer_family
    import megatron_ext.progressive.runs.progressive_run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            outcome = _rehearse(recorder, request)
            Path(request["result"]).write_bytes(pickle.dumps(outcome))
            os._exit(0)
        os.waitpid(child, 0)
        print("done", flush=True)


def _rehearse(recorder: Recorder, request: dict[str, Any]) -> Rehearsed:
    os.environ |= request["environment"]
    sys.argv = [request["script"], *request["flags"]]
    kept: list[Rehearsal] = []
    server: Any = rehearsed_rank
    server.simulate, server.print_report = lambda device: recorder, kept.append
    try:
        if request["before"] is not None:
            path, name = request["before"]
            getattr(_load(path), name)()
        _load(request["script"]).main()
    except BaseException as error:
        return Rehearsed(error=f"{type(error).__name__}: {error}")
    return _outcome(kept[0])


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _outcome(rehearsal: Rehearsal) -> Rehearsed:
    recorder = rehearsal.recorder
    return Rehearsed(
        activity=recorder.activity,
        peak=rehearsal.peak,
        parameters=recorder.parameters,
        flops=sum(n for (scope, _, _), n in recorder.flops.items() if scope == rehearsal.step),
        bubble=rehearsal.bubble,
        notes=oddities(rehearsal),
    )


if __name__ == "__main__":
    main()
