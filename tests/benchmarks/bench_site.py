"""How long the site over many reports takes, and how much memory.

``python tests/benchmarks/bench_site.py REPORT [N]``: copies one report folder N times (1,000),
each under parameters of its own, and writes the site over them. In Chromium, if it is there, the
time until the index has filtered its rows.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from workbench.site import KEY, STATUS, TABLE, write_site

NEEDED = (STATUS, KEY, TABLE, "table.csv", "figures.js", "log.txt", "thumbnail.json")
MODELS = 40


def main() -> None:
    source = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        copy(source, out, count)
        for what in ("from nothing", "again"):
            clock, processor = time.perf_counter(), time.process_time()
            index = write_site(out)
            print(
                f"{count} reports {what}: {time.perf_counter() - clock:.1f} s, of the processor "
                f"{time.process_time() - processor:.1f} s; "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB at most"
            )
        for file in ("index.html", "compare.html", "all.parquet"):
            print(f"  {file}: {(out / file).stat().st_size / 1e6:.1f} MB")
        browse(index)


def copy(source: Path, out: Path, count: int) -> None:
    about = json.loads((source / STATUS).read_text("utf-8"))
    for nth in range(count):
        model, seed = nth % MODELS, nth // MODELS
        name = f"{source.name}-{model}-{seed}"
        (out / name).mkdir()
        for file in NEEDED:
            if (source / file).is_file():
                shutil.copy(source / file, out / name / file)
        (out / name / "report.html").symlink_to((source / "report.html").resolve())
        mine = {"model": f"./models/m{model}", "seed": seed}
        changed = about | {
            "name": name,
            "notebook": source.name,
            "parameters": about["parameters"] | mine,
            "given": about["given"] | mine,
        }
        (out / name / STATUS).write_text(json.dumps(changed), encoding="utf-8")


def browse(index: Path) -> None:
    chromium = Path("/usr/bin/chromium")
    if not chromium.is_file():
        return
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        clock = time.perf_counter()
        tab.goto(index.as_uri())
        expect(tab.locator("#count")).to_have_text(re.compile("reports"))
        opened = time.perf_counter() - clock
        clock = time.perf_counter()
        tab.locator("select[data-column]").last.select_option("7")
        expect(tab.locator("#count")).to_have_text(re.compile(" of "))
        print(f"  opened in {opened:.1f} s, filtered in {time.perf_counter() - clock:.2f} s")
        browser.close()


if __name__ == "__main__":
    main()
