"""Run programs one after another, on the core that the tests leave free; conftest.py starts this.

    python ahead.py FOLDER '[["name", ["program.py", "argument"], {"VARIABLE": "value"}], ...]'

Each one's output goes to FOLDER/name.txt, and then its exit status to FOLDER/name.status. FOLDER
among the arguments is replaced by the folder.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
for name, arguments, environment in json.loads(sys.argv[2]):
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=Path(__file__).parent, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=clean | {"OMP_NUM_THREADS": "1"} | environment)
    (folder / f"{name}.txt").write_text(done.stdout)
    (folder / f"{name}.part").write_text(str(done.returncode))
    (folder / f"{name}.part").rename(folder / f"{name}.status")
