#!/usr/bin/env python3
"""Checks the shape of the source tree: which way includes point, how large files are, how they begin.

layering.py [ROOT]      checks the tree at ROOT (default: the one this file is in); exit code 1 when a rule is broken
layering.py --self-test plants one violation at a time in a temporary tree and expects each to be found
"""

import ast
import posixpath
import re
import sys
import tempfile
from pathlib import Path

# ---- The rules ---------------------------------------------------------------------------------------------------------

ALLOWED_LAYERS = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "proto": {"proto"},
    "server": {"server", "engine", "proto"},
    "tests": {"tests", "server", "engine", "kernels", "proto"},
}
# CHECK itself, and plain data: no tensor in them.
CHECK, OPS_TYPES = "kernels/check.h", "kernels/ops_types.h"
SERVER_MAY_INCLUDE = {f"engine/{name}.h" for name in ("engine", "request", "options", "stats", "inspect", "plan")} | {CHECK}
SERVER_SHARED_HEADER, SERVER_FOLDER = re.compile(r"server/\w+\.h$"), re.compile(r"server/\w+/")
# The rank's backend is chosen once; the model gets it by reference, the scheduler never hears of it.
BACKEND_MAKERS = {"engine/rank.cc", "engine/plan.cc", "server/main.cc"}
MAKES_BACKEND = re.compile(r"\bMakeBackend\s*\(")
# model/ and schedule/ meet in rank.cc; the step is plain data, which the runner turns into arrays.
STEP = "engine/schedule/step.h"
STEP_USERS = re.compile(r"engine/model/runner\w*\.(h|cc)$")

CUDA_HEADER = re.compile(r"(cuda|cublas|cudnn|nccl|nvml|nvtx|driver_types|vector_types)\w*(/|\.h|\.cuh|$)")
WIRE_HEADER = re.compile(r"(grpc|grpcpp|google/protobuf|boost/beast|boost/asio|openssl/ssl|openssl/bio)(/|\.h)")
GETENV = re.compile(r"\b(secure_)?getenv\s*\(|\benviron\b")
CONDITIONAL = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif)\b(.*)")
INCLUDE_GUARD = re.compile(r"^\s*CACHALOT_\w+_H_\s*$")
UNFINISHED = re.compile(r"\b(TODO|FIXME)\b")
WORK_PATH = re.compile(r"(?<![\w.$}])/(work|root|home)/\w")

LINE_BUDGET = {".h": 200, ".cc": 500, ".cu": 700, ".cuh": 700, ".py": 500}
TOLERANCE = 1.5  # over budget is printed, over TOLERANCE times the budget is an error
FUNCTION_BUDGET = 60

CPP = (".h", ".cc", ".cu", ".cuh")
COMMENT_START = {**dict.fromkeys((*CPP, ".proto"), ("//",)), ".py": ('"""', "#"), ".sh": ("#",), ".cmake": ("#",)}
SKIPPED_FOLDERS = {"build", "__pycache__"}
THIS_FILE = "tests/layering.py"  # names what it looks for


# ---- Reading the tree --------------------------------------------------------------------------------------------------


class Tree:
    """Path relative to the root -> text, of every text file that people wrote; of data/ folders only code."""

    def __init__(self, root):
        self.text = {}
        for folder, name in self._walk(Path(root)):
            path = folder / name
            if "data" in path.relative_to(root).parts and path.suffix not in COMMENT_START:
                continue
            content = path.read_bytes()
            if b"\0" not in content:
                self.text[path.relative_to(root).as_posix()] = content.decode("utf-8", "replace")
        self.includes = {path: self._includes(path) for path in self.text if path.endswith(CPP)}

    @staticmethod
    def _walk(folder):
        for entry in sorted(folder.iterdir()):
            if entry.is_symlink():
                continue
            if entry.is_dir():
                if entry.name not in SKIPPED_FOLDERS and (not entry.name.startswith(".") or entry.name == ".ci"):
                    yield from Tree._walk(entry)
            elif entry.is_file() and entry.name != ".git":  # which it is in a work tree of its own
                yield folder, entry.name

    def _includes(self, path):
        """(line number, target) of each include; a target in the tree is written relative to the root."""
        found = []
        for number, line in enumerate(self.text[path].splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if match:
                beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
                found.append((number, beside if match[1] not in self.text and beside in self.text else match[1]))
        return found


def layer_of(path):
    if re.search(r"\.pb\.h$", path):
        return "proto"
    top = path.split("/")[0]
    return top if "/" in path and top in ALLOWED_LAYERS else None


# ---- The checks: each yields (path, line number, message) --------------------------------------------------------------


def check_include_directions(tree):
    for path, includes in tree.includes.items():
        source = layer_of(path)
        if source is None:
            continue
        for line, target in includes:
            reason = include_error(path, source, target)
            if reason:
                yield path, line, f'includes "{target}": {reason}'


def include_error(path, source, target):
    layer = layer_of(target)
    if source == "server" and target == "kernels/backend.h" and path in BACKEND_MAKERS:
        return None
    if source == "server" and layer in ("engine", "kernels"):
        return None if target in SERVER_MAY_INCLUDE else "server/ sees the engine's top-level headers only"
    if SERVER_SHARED_HEADER.match(path) and SERVER_FOLDER.match(target):
        return "what server/'s folders share knows none of them"
    if layer is not None and layer not in ALLOWED_LAYERS[source]:
        return f"{source}/ knows nothing of {layer}/"
    if path.startswith("engine/model/") and target.startswith("engine/schedule/"):
        return None if target == STEP and STEP_USERS.match(path) else "model/ knows nothing of schedule/ but the runner's step.h"
    if path.startswith("engine/schedule/") and target.startswith("engine/model/"):
        return "schedule/ knows nothing of model/"
    if path.startswith("engine/schedule/") and layer == "kernels" and target not in (CHECK, OPS_TYPES):
        return "schedule/ speaks tokens and block ids, not tensors"
    if CUDA_HEADER.match(target) and source != "tests" and not path.startswith("kernels/cuda/"):
        return "CUDA headers belong to kernels/cuda/"
    if WIRE_HEADER.match(target) and source in ("engine", "kernels"):
        return f"{source}/ has never heard of wire formats"
    return None


def check_include_cycles(tree):
    """Depth-first search; every cycle is reported once, at the file where it closes."""
    done, stack = set(), []

    def visit(path):
        if path in stack:
            cycle = stack[stack.index(path):] + [path]
            yield stack[-1], 1, "include cycle: " + " -> ".join(cycle)
        elif path not in done:
            stack.append(path)
            for _, target in tree.includes.get(path, ()):
                if target in tree.includes:
                    yield from visit(target)
            stack.pop()
            done.add(path)

    for path in tree.includes:
        yield from visit(path)


def check_one_backend_vocabulary(tree):
    for path, text in tree.text.items():
        if not path.startswith("engine/"):
            continue
        if path.endswith((".cu", ".cuh")):
            yield path, 1, "CUDA sources belong to kernels/cuda/"
        for number, line in enumerate(text.splitlines(), 1):
            conditional = CONDITIONAL.match(line) if path.endswith(CPP) else None
            if conditional and not (conditional[1] == "ifndef" and INCLUDE_GUARD.match(conditional[2])):
                yield path, number, f"conditional compilation in engine/: {line.strip()}"


def check_calls(tree):
    for path in tree.includes:
        layer = layer_of(path)
        for number, line in enumerate(tree.text[path].splitlines(), 1):
            code = line.split("//")[0]
            if layer in ("kernels", "engine", "server") and not path.startswith("server/options") and GETENV.search(code):
                yield path, number, "the environment is read in server/options only"
            if layer in ("engine", "server") and path not in BACKEND_MAKERS and MAKES_BACKEND.search(code):
                yield path, number, "only engine/rank.cc and server/main.cc make a backend"


def check_first_comment(tree):
    for path, text in tree.text.items():
        name = Path(path).name
        starts = ("#",) if name == "CMakeLists.txt" else COMMENT_START.get(Path(path).suffix)
        lines = text.splitlines()
        if lines and lines[0].startswith("#!"):
            starts, lines = starts or ("#",), lines[1:]
        if starts and text.strip() and not (lines and lines[0].startswith(starts) and len(re.findall(r"\w+", lines[0])) > 1):
            yield path, 1, "the first line says what the file is, as a comment"


def check_text(tree):
    for path, text in tree.text.items():
        if path in (THIS_FILE, "LICENSE"):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if UNFINISHED.search(line):
                yield path, number, f"unfinished: {line.strip()}"
            if WORK_PATH.search(line):
                yield path, number, f"names a path of somebody's machine: {line.strip()}"


def check_sizes(tree):
    for path, lines, budget in sizes_over_budget(tree):
        if lines > TOLERANCE * budget:
            yield path, lines, f"{lines} lines; more than {TOLERANCE} times the budget of {budget}"


CHECKS = [check_include_directions, check_include_cycles, check_one_backend_vocabulary, check_calls,
          check_first_comment, check_text, check_sizes]


# ---- Budgets: printed, not errors --------------------------------------------------------------------------------------


def sizes_over_budget(tree):
    for path, text in tree.text.items():
        budget = LINE_BUDGET.get(Path(path).suffix)
        lines = len(text.splitlines())
        if budget and lines > budget:
            yield path, lines, budget


def long_functions(tree):
    """(path, first line, name, lines) of functions over budget; kernels are exempt."""
    for path, text in tree.text.items():
        if path.startswith("kernels/"):
            continue
        functions = cpp_functions(text) if path.endswith(CPP) else python_functions(text) if path.endswith(".py") else ()
        for first, name, lines in functions:
            if lines > FUNCTION_BUDGET:
                yield path, first, name, lines


def python_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name, node.end_lineno - node.lineno + 1


def cpp_functions(text):
    """Functions of clang-formatted code: a body opens at the end of a line and closes at its statement's indentation."""
    lines = text.splitlines()
    end = -1
    for index, line in enumerate(lines):
        if index <= end or not line.rstrip().endswith("{"):
            continue
        start = index
        while start > 0 and not re.search(r"(^\s*(//|#).*|[;{}:]\s*|^\s*)$", lines[start - 1]):
            start -= 1
        head = " ".join(part.strip() for part in lines[start:index + 1])
        if "(" not in head or re.match(r"(namespace|class|struct|enum|union|extern)\b", head):
            continue
        indent = re.match(r"\s*", lines[start])[0]
        end = next((i for i in range(index + 1, len(lines)) if lines[i].startswith(indent + "}")), index)
        yield start + 1, re.search(r"([\w:~]+)\s*\(", head)[1] if re.search(r"[\w:~]+\s*\(", head) else head, end - start + 1


# ---- Running -----------------------------------------------------------------------------------------------------------


def find_errors(root):
    tree = Tree(root)
    return tree, [f"{path}:{line}: {message}" for check in CHECKS for path, line, message in check(tree)]


def main(root):
    tree, errors = find_errors(root)
    for path, lines, budget in sizes_over_budget(tree):
        print(f"note: {path} has {lines} lines, its budget is {budget}")
    for path, line, name, lines in long_functions(tree):
        print(f"note: {path}:{line}: {name} has {lines} lines, the budget is {FUNCTION_BUDGET}")
    for error in errors:
        print(f"error: {error}")
    print(f"layering: {len(tree.includes)} C++ files, {sum(map(len, tree.includes.values()))} includes, {len(errors)} errors")
    if not tree.includes:
        print("error: no C++ file found")
    return 1 if errors or not tree.includes else 0


# ---- Self-test ---------------------------------------------------------------------------------------------------------

CLEAN_TREE = {
    "kernels/check.h": "// CHECK for bugs.\n",
    "kernels/backend.h": '// The one factory.\n#include "kernels/check.h"\n',
    "kernels/cuda/gemm.cu": "// The GEMM on Hopper.\n#include <cuda_runtime.h>\n#ifdef __CUDACC__\n#endif\n",
    "engine/engine.h": "// The engine itself.\n#ifndef CACHALOT_ENGINE_ENGINE_H_\n#endif\n",
    "engine/rank.cc": '// The step loop.\n#include "engine/engine.h"\n#include "kernels/backend.h"\n',
    "engine/schedule/step.h": "// One step, plain data.\n",
    "engine/model/config.h": '// The checkpoint\'s config.\n#include "kernels/backend.h"\n',
    "engine/model/runner.cc": '// Plan to arrays.\n#include "engine/schedule/step.h"\n#include "engine/model/config.h"\n',
    "server/main.cc": '// Wiring only.\n#include "engine/engine.h"\n#include "kernels/backend.h"\n#include <grpcpp/grpcpp.h>\n',
    "server/options.cc": '// All options.\nconst char* a = getenv("A");\n',
    "server/grpc/service.cc": '// RPC to calls.\n#include "proto/cachalot/v1/x.pb.h"\n#include "kernels/check.h"\n',
    "tests/engine/engine_test.cc": '// Tests the engine.\n#include "engine/model/config.h"\nint main() { getenv("A"); }\n',
    "tests/run.sh": "#!/bin/sh\n# Runs the tests.\n",
    "build/junk.h": "int no_comment;\n",
    "tests/engine/data/expected.txt": "TODO is part of the data\n",
}

# File, its text, what the report must say. A file of the clean tree is replaced.
VIOLATIONS = [
    ("kernels/ops.h", '// The verbs of the model.\n#include "engine/engine.h"\n', "kernels/ knows nothing of engine/"),
    ("kernels/ops.h", '// The verbs of the model.\n#include "server/cli.h"\n', "kernels/ knows nothing of server/"),
    ("kernels/cpu/a.cc", "// A verb.\n#include <cuda_fp8.h>\n", "CUDA headers belong to kernels/cuda/"),
    ("kernels/cpu/a.cc", "// A verb.\n#include <boost/asio.hpp>\n", "never heard of wire formats"),
    ("engine/a.cc", '// A part.\n#include "server/main.h"\n', "engine/ knows nothing of server/"),
    ("engine/a.cc", '// A part.\n#include "proto/cachalot/v1/x.pb.h"\n', "engine/ knows nothing of proto/"),
    ("engine/a.cc", "// A part.\n#include <grpcpp/server.h>\n", "never heard of wire formats"),
    ("engine/a.cc", "// A part.\n#include <cuda_runtime.h>\n", "CUDA headers belong to kernels/cuda/"),
    ("engine/a.cc", "// A part.\n#ifdef __CUDACC__\n#endif\n", "conditional compilation in engine/"),
    ("engine/a.cc", "// A part.\n#if CACHALOT_CUDA\n#endif\n", "conditional compilation in engine/"),
    ("engine/a.cu", "// A kernel.\n", "CUDA sources belong to kernels/cuda/"),
    ("engine/model/a.cc", "// A part.\nauto b = MakeBackend(options);\n", "make a backend"),
    ("engine/model/moe.cc", '// The experts.\n#include "engine/schedule/step.h"\n', "model/ knows nothing of schedule/"),
    ("engine/model/runner.h", '// The runner.\n#include "engine/schedule/scheduler.h"\n', "model/ knows nothing of schedule/"),
    ("engine/schedule/a.cc", '// It plans.\n#include "engine/model/config.h"\n', "schedule/ knows nothing of model/"),
    ("engine/schedule/a.cc", '// It plans.\n#include "../model/config.h"\n', "schedule/ knows nothing of model/"),
    ("engine/schedule/a.cc", '// It plans.\n#include "kernels/backend.h"\n', "not tensors"),
    ("server/router.cc", '// All ranks.\n#include "kernels/backend.h"\n', "top-level headers only"),
    ("server/main.cc", '// Wiring only.\n#include "kernels/ops.h"\n', "top-level headers only"),
    ("server/router.cc", '// All ranks.\n#include "engine/schedule/step.h"\n', "top-level headers only"),
    ("server/router.cc", '// All ranks.\nauto a = std::getenv("A");\n', "environment is read in server/options"),
    ("kernels/a.cc", "// A part.\nextern char** environ;\n", "environment is read in server/options"),
    ("server/options.h", '// The options.\n#include "server/grpc/service.h"\n', "share knows none of them"),
    ("kernels/check.h", '// CHECK for bugs.\n#include "kernels/backend.h"\n', "include cycle: "),
    ("kernels/a.h", '// A loop of one.\n#include "a.h"\n', "include cycle: kernels/a.h -> kernels/a.h"),
    ("kernels/a.h", "// A long header.\n" + "int x;\n" * 300, "301 lines"),
    ("server/a.cc", "// A long source.\n" + "int x;\n" * 750, "751 lines"),
    ("kernels/cuda/a.cu", "// A long kernel.\n" + "int x;\n" * 1050, "1051 lines"),
    ("tests/a.py", '"""A long script."""\n' + "x = 1\n" * 750, "751 lines"),
    ("engine/a.h", "#ifndef CACHALOT_ENGINE_A_H_\n#endif\n", "first line says"),
    ("proto/a.proto", 'syntax = "proto3";\n', "first line says"),
    ("deploy/a.sh", "#!/bin/sh\nset -eu\n", "first line says"),
    (".ci/run", "#!/bin/sh\nset -eu\n", "first line says"),
    ("tests/data/a.py", "import os\n", "first line says"),
    ("tests/CMakeLists.txt", "enable_testing()\n", "first line says"),
    ("server/a.cc", "// A part.\n// TODO: the rest\n", "unfinished"),
    ("deploy/Dockerfile", "# FIXME later\n", "unfinished"),
    ("README.md", "Look into /work/main/x\n", "somebody's machine"),
    ("tests/a.cc", '// A test.\nopen("/home/me/x");\n', "somebody's machine"),
]


def plant(root, files):
    for path, text in files.items():
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def self_test():
    failures = []
    with tempfile.TemporaryDirectory() as root:
        plant(root, CLEAN_TREE)
        failures += [f"the clean tree: {error}" for error in find_errors(root)[1]]
    for path, text, expected in VIOLATIONS:
        with tempfile.TemporaryDirectory() as root:
            plant(root, {**CLEAN_TREE, path: text})
            errors = find_errors(root)[1]
            if not any(error.startswith(path + ":") and expected in error for error in errors):
                failures.append(f"{path}: expected '{expected}', found {errors}")
            if len(errors) > 1:
                failures.append(f"{path}: expected one error, found {errors}")
    body = "  x();\n" * FUNCTION_BUDGET
    with tempfile.TemporaryDirectory() as root:
        long_cpp = f"// A part.\nnamespace a {{\nint Long(int b,\n         int c) {{\n{body}}}\nint Short() {{\n  y();\n}}\n}}\n"
        plant(root, {"server/a.cc": long_cpp, "tests/a.py": '"""A script."""\ndef long():\n' + body.replace(";", "")})
        found = [(path, line, name) for path, line, name, _ in long_functions(Tree(root))]
        if found != [("server/a.cc", 3, "Long"), ("tests/a.py", 2, "long")]:
            failures.append(f"long functions: found {found}")
    for failure in failures:
        print(f"self-test: {failure}")
    print(f"layering self-test: {len(VIOLATIONS)} violations planted, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        sys.exit(self_test())
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()))
