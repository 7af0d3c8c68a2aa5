"""Captures of all models of transformers, and of other libraries: python benchmarks/capture_zoo.py.

    python benchmarks/capture_zoo.py                 # every type; resumes where it was stopped
    python benchmarks/capture_zoo.py bert llama      # these, whatever is known of them
    python benchmarks/capture_zoo.py --slice 60      # every so many of them, in a minute or two
    python benchmarks/capture_zoo.py --libraries     # of those libraries that are installed
    python benchmarks/capture_zoo.py --summary       # keep what the docs show of it

Each model is small and random, and runs in a process of its own with eager and fused attention,
and padding where it takes a mask. Its records are held by position against every softmax that
PyTorch's dispatcher saw, and against what the model returns as its attentions; masks against the
scores that went into the softmax; its output against that without a capture. Results go to a file
of one line each, `--results`; the exit code is 1 if anything is silent or crashes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from torch import Tensor, nn
from zoo_oracle import Verdict, judge, watched

from pytest_attnheat import AttentionRecord, capture_attention

RESULTS, SUMMARY = Path(tempfile.gettempdir()), Path(__file__).with_suffix(".json")
MEMORY, SECONDS = 10 * 2**30, 60
SAME = 1e-5
# So many seconds of its own time it is tried to make a model run.
TRYING = 4.0
# From best to worst: a type is as its worst implementation.
WORDS = ("none", "right", "named", "marked", "silent", "crash", "not built")


@dataclasses.dataclass
class Case:
    """A model to capture.

    Attributes:
        name: What it is.
        build: Makes it with an implementation of attention; the same weights each time.
        call: Runs it; its result is what the model returns.
        implementations: What may be asked for.
        returned: Runs it so that it returns its attentions; returns them in order.
        how: How it was made.
    """

    name: str
    build: Callable[[str], nn.Module]
    call: Callable[[nn.Module], Any]
    implementations: tuple[str, ...] = ("",)
    returned: Callable[[nn.Module], list[Tensor]] = lambda model: []
    how: str = ""


def examine(case: Case) -> dict[str, Any]:
    """Return what is to be said of a case."""
    results: dict[str, Any] = {"name": case.name, "how": case.how}
    worst = "none"
    for implementation in case.implementations:
        try:
            model = case.build(implementation)
        except (ValueError, ImportError) as error:
            results[implementation] = {"word": "not offered", "why": str(error)[:150]}
            continue
        result = _captured(case, model, fused=implementation != "eager")
        results[implementation] = result
        worst = max(worst, result["word"], key=WORDS.index)
    results["word"] = worst
    return results


@torch.no_grad()
def _captured(case: Case, model: nn.Module, *, fused: bool) -> dict[str, Any]:
    def run() -> Any:
        torch.manual_seed(5)
        return case.call(model)

    run()  # What is made at the first call, such as caches of positions.
    plain = [t.clone() for t in tensors_in(run())]
    with watched(model) as seen:
        run()
    returned = _returned(case, model)
    try:
        with (
            warnings.catch_warnings(),
            capture_attention(model, allow_empty=True, allow_unseen=True) as trace,
        ):
            warnings.simplefilter("ignore")
            captured = list(tensors_in(run()))
    except Exception as error:
        return {"word": "crash", "why": f"{type(error).__name__}: {error}"[:300]}
    verdict = judge(trace, seen, returned, lambda record: heads_of(model, record), fused=fused)
    _compare_outputs(verdict, plain, captured, exact=not trace.changes)
    kept = {k: v[:6] if isinstance(v, list) else v for k, v in vars(verdict).items()}
    return {"word": verdict.word, **kept}


def _compare_outputs(
    verdict: Verdict, plain: list[Tensor], captured: list[Tensor], *, exact: bool
) -> None:
    if [t.shape for t in plain] != [t.shape for t in captured]:
        verdict.wrong.append("the output has another shape under capture")
    for before, after in zip(plain, captured, strict=False):
        if torch.equal(before.nan_to_num(), after.nan_to_num()) or not before.is_floating_point():
            continue
        off = float((before - after).abs().nan_to_num().max())
        if exact or off > SAME:
            verdict.wrong.append(f"the output is off by {off:.1e} under capture")
            return


def _returned(case: Case, model: nn.Module) -> list[Tensor]:
    torch.manual_seed(5)
    try:
        return [w.clone() for w in case.returned(model) if w.ndim == 4]
    except Exception:  # Many have no such option.
        return []


def heads_of(model: nn.Module, record: AttentionRecord) -> set[int]:
    """How many heads a module or its configuration, or one around it, says that it has."""
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads")
    layer = "" if record.layer == type(model).__name__ else record.layer
    holders = [getattr(model.get_submodule(layer), "config", None)]
    while layer and record.kind != "pooling":  # Of pooling only the module itself can tell.
        holders.append(model.get_submodule(layer))
        layer = layer.rpartition(".")[0]
    holders.append(model.get_submodule(layer))
    values = (getattr(one, name, None) for one in [*holders[1:], holders[0]] for name in names)
    return set(next(([value] for value in values if type(value) is int and value > 0), []))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from tensors_in(one)
    elif isinstance(output, list | tuple):
        for one in output:
            yield from tensors_in(one)


# The types of transformers.


def of_transformers(name: str) -> Case:
    """A case of a model type: the first rules, class and inputs with which it runs."""
    import zoo_models as zoo
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    override, why = zoo.OVERRIDES.get(name, {}), []
    until = time.process_time() + TRYING
    for rules in zoo.KINDS:
        if time.process_time() > until:
            break
        try:
            config = zoo.config_of(CONFIG_MAPPING[name], rules, override)
            kinds = zoo.classes_of(name, config)
        except Exception as error:
            why.append(f"{rules}: {type(error).__name__}: {error}")
            continue
        for kind in kinds[:3]:

            def build(attention: str, kind: Any = kind, config: Any = config) -> nn.Module:
                model = zoo.model_of(kind, config, attention)
                zoo.strengthen(model)
                return model

            try:
                model = build("eager")
            except ImportError as error:
                raise LookupError(f"ImportError: {' '.join(str(error).split())}"[:250]) from error
            except Exception as error:
                why.append(f"{rules} {kind.__name__}: {type(error).__name__}: {error}")
                continue
            given = zoo.INPUTS.get(name)
            for inputs in [given(config)] if given else zoo.inputs_of(model, config):
                if time.process_time() > until:
                    break
                try:
                    with torch.no_grad():
                        model(**inputs)
                except Exception as error:
                    why.append(
                        f"{rules} {kind.__name__} {[*inputs]}: {type(error).__name__}: {error}"
                    )
                    continue
                return Case(
                    name, build, lambda model, inputs=inputs: model(**inputs), ("eager", "sdpa"),
                    lambda model, inputs=inputs: attentions(
                        model(**inputs, output_attentions=True)),
                    f"{rules} {kind.__name__} {' '.join(inputs)}",
                )  # fmt: skip
    raise LookupError("\n".join(one[:250] for one in why[:8]) or "it has no class of a model")


def attentions(output: Any) -> list[Tensor]:
    """The weights that a model returned."""
    found = []
    for name, value in output.items() if isinstance(output, Mapping) else ():
        if name.endswith("attentions"):
            found += list(tensors_in(value))
    return found


def type_names() -> list[str]:
    """All model types."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


# Each in a process of its own.


def apart(name: str, find: Callable[[str], Case]) -> dict[str, Any]:
    """Examine a case in a fork of this process, which has PyTorch and transformers loaded."""
    started = time.perf_counter()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(name, find, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(child, 0)
    ended = (
        f"it ended with signal {status & 127}" if status & 127 else f"it ended with {status >> 8}"
    )
    result = json.loads(data) if data else {"name": name, "word": "not built", "why": ended}
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def _in_child(name: str, find: Callable[[str], Case], writing: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(2, 1)
        warnings.simplefilter("ignore")
        try:
            case = find(name)
        except LookupError as error:
            result: dict[str, Any] = {"name": name, "word": "not built", "why": str(error.args[0])}
        else:
            result = examine(case)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"[:300]
        result = {"name": name, "word": "not built", "why": f"the bench: {text}"}
    os.write(writing, json.dumps(result).encode())
    os._exit(0)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What is known, by name; the last line of a name counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


# What the docs show.


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The names of what is right, and of all else what is to be said of it."""
    found: dict[str, Any] = {word: {} for word in WORDS}
    for name, result in sorted(results.items()):
        found[result["word"]][name] = _said(result)
    found["right"], found["none"] = sorted(found["right"]), sorted(found["none"])
    return found


def _said(result: Mapping[str, Any]) -> str:
    for one in (result, *(result.get(i, {}) for i in ("eager", "sdpa", ""))):
        if one.get("word") in ("not offered", "none"):
            continue
        lists = [one.get(k) or [] for k in ("wrong", "silent", "marked", "named", "unseen")]
        said = next((texts[0] for texts in lists if texts), one.get("why", ""))
        if said:
            lines = [line for line in said.splitlines() if line.strip()]
            return " ".join(lines[0].split())[:160] if lines else ""
    return ""


def tables(known: Mapping[str, Any]) -> str:
    """Two tables: how many are how, and what is said of those that are not right."""
    head = ["", "with attention", "right", "named", "marked", "silent", "crash", "not built"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rest = ["| | | what is said |", "|---|---|---|"]
    for part, words in known.items():
        counts = {word: len(words[word]) for word in WORDS}
        with_attention = sum(counts[word] for word in WORDS[1:-1])
        cells = [with_attention, *(counts[word] for word in WORDS[1:])]
        lines.append(f"| {part} | {' | '.join(map(str, cells))} |")
        for word in WORDS[2:-1]:
            rest += [
                f"| {name} | {word} | {text.replace('|', '/')} |"
                for name, text in words[word].items()
            ]
    return "\n".join([*lines, "", *rest])


def versions(libraries: Iterable[str]) -> str:
    """PyTorch and these, with their versions."""
    named = importlib.metadata.packages_distributions()
    known = ((name, named.get(name)) for name in libraries)
    found = [f"{one} {importlib.metadata.version(d[0])}" for one, d in known if d]
    return ", ".join(found)


def main() -> None:
    """Run what is asked for, or print what is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="types, or cases of libraries")
    parser.add_argument("--libraries", action="store_true", help="libraries, not transformers")
    parser.add_argument("--slice", type=int, help="so many of all, evenly")
    parser.add_argument("--again", help="those that are so far: 'not built', for instance")
    parser.add_argument("--results", type=Path, help="where results go, one a line")
    parser.add_argument("--summary", action="store_true", help="write what the docs show")
    parser.add_argument("--table", action="store_true", help="print what the docs show")
    asked = parser.parse_args()
    if asked.table:
        print(tables(json.loads(SUMMARY.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    if asked.libraries:
        import zoo_libraries

        every, find, load = zoo_libraries.names(), zoo_libraries.find, zoo_libraries.load
        modules = list(dict.fromkeys(name.partition(": ")[0] for name in every))
        part = f"cases of {len(modules)} libraries"
    else:
        import transformers.masking_utils
        import transformers.modeling_utils

        every, find, load = type_names(), of_transformers, lambda name: None
        part = f"model types of transformers {transformers.__version__}"
    path = asked.results or RESULTS / f"capture_zoo{'_libraries' * asked.libraries}.jsonl"
    known = read(path)
    if asked.summary:
        before = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else {}
        kept = {k: v for k, v in before.items() if ("libraries" in k) != asked.libraries}
        kept[part] = summary({name: known[name] for name in every if name in known})
        SUMMARY.write_text(json.dumps(dict(sorted(kept.items(), reverse=True)), indent=1) + "\n")
        return
    names = asked.names or [name for name in every if name not in known]
    if asked.slice:
        names = every[:: max(len(every) // asked.slice, 1)]
    if asked.again:
        names = [name for name in known if known[name]["word"] in asked.again.split(",")]
    worst = "none"
    for number, name in enumerate(names, 1):
        load(name)
        result = apart(name, find)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        said = f"{result['word']}, {result['seconds']} s  {_said(result)}"
        print(f"{number}/{len(names)} {name}: {said}", flush=True)
        if result["word"] != "not built":
            worst = max(worst, result["word"], key=WORDS.index)
    sys.exit(worst in ("silent", "crash"))


if __name__ == "__main__":
    main()
