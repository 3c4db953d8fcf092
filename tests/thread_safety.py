#!/usr/bin/env python3
"""Holds the sources that lock to their thread annotations: thread_safety.py CLANG COMPILE_COMMANDS ROOT.

Clang looks at each of them, and at one that is wrong, which it must refuse.
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = ["-std=c++20", "-fsyntax-only", "-Wthread-safety", "-Werror=thread-safety"]
WRONG = """
#include "server/mutex.h"
struct Counter {
  int Get() const { return count_; }
  mutable cachalot::Mutex mutex_;
  int count_ ABSL_GUARDED_BY(mutex_) = 0;
};
"""


def search_paths(command):
    words = shlex.split(command)
    attached = [word for word in words if word.startswith(("-I", "-D"))]
    return attached + [word for pair in zip(words, words[1:]) if pair[0] == "-isystem" for word in pair]


def locks(source):
    """A lock is taken in the file itself, or in a reactor, which are templates."""
    text = source.read_text()
    return "MutexLock" in text or "answer_reactors.h" in text


def main(clang, commands, root):
    entries = {Path(entry["directory"], entry["file"]).resolve(): entry for entry in json.loads(Path(commands).read_text())}
    sources = [path for path in sorted(entries) if path.is_relative_to(Path(root, "server")) and locks(path)]
    if not sources:
        print("no source of server/ takes a lock")
        return 1

    def check(source):
        entry = entries[source]
        command = [clang, *FLAGS, *search_paths(entry["command"]), str(source)]
        return subprocess.run(command, cwd=entry["directory"], capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(check, sources))
    for source, result in zip(sources, results):
        if result.returncode != 0:
            print(f"{source}:\n{result.stderr}")
    paths = search_paths(entries[sources[0]]["command"])
    wrong = subprocess.run([clang, *FLAGS, *paths, "-x", "c++", "-"], input=WRONG, capture_output=True, text=True)
    if "thread-safety" not in wrong.stderr:
        print(f"a member was read without its lock, and {clang} did not mind: {wrong.stderr}")
        return 1
    print(f"{len(sources)} sources hold their locks" if not any(result.returncode for result in results) else "failed")
    return any(result.returncode for result in results)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
