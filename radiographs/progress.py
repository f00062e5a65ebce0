"""A long run's tables while they grow, so that a run that was killed at any moment goes on where it was.

    OUT/index.csv.part     rows so far, and more after a crash
    rejected.csv.part      the same for what was not taken
    OUT/progress.json      how many bytes of both are valid, what was counted, and the settings of the run

At the end the tables are copied to their names, then progress.json goes, then the parts: whichever of these steps a
kill interrupts, the next run finds either a valid progress.json with whole parts, or none and starts over.
"""
import csv
import os
import shutil

from common.cli import InputError, read_json, whole_file, write_json
from common.tables import read_table

COUNTS = ("taken", "rejected", "missing", "synthetic")


class Progress:
    """What a run has done. `counts` holds how many images were taken, rejected, missing, and say they are synthetic."""

    def __init__(self, out, tables, settings):
        """`tables`: {path: header} of index.csv and of rejected.csv. `settings`: what decides the output; a run with
        other settings is not continued but begun anew."""
        self.path, self.settings, self.tables = out / "progress.json", settings, list(tables)
        self.parts = [path.with_name(path.name + ".part") for path in tables]
        self.counts = self.continued()
        if not self.counts:
            self.counts = dict.fromkeys(COUNTS, 0)
            for part in self.parts:
                part.unlink(missing_ok=True)
        self.files = [open(part, "a", newline="", encoding="utf-8") for part in self.parts]
        self.index, self.rejected = map(csv.writer, self.files)
        if not self.done:
            self.index.writerow(tables[self.tables[0]])
            self.rejected.writerow(tables[self.tables[1]])

    @property
    def done(self):
        """How many images of the source are dealt with."""
        return self.counts["taken"] + self.counts["rejected"] + self.counts["missing"]

    def continued(self):
        """The counts of an interrupted run with these settings, whose tables are cut to what is valid; None if there
        is none or if its files are damaged."""
        try:
            state = read_json(self.path)
            counts, ends = {key: int(state[key]) for key in COUNTS}, list(map(int, state["ends"]))
            cut_short = any(os.path.getsize(part) < end for part, end in zip(self.parts, ends))
            if state["settings"] != self.settings or cut_short:
                return None
            for part, end in zip(self.parts, ends):
                os.truncate(part, end)
            rows = [sum(1 for _ in read_table(part)) for part in self.parts]
        except (InputError, OSError, KeyError, TypeError, ValueError):
            return None
        return counts if rows == [counts["taken"], counts["rejected"]] and len(ends) == 2 else None

    def take(self, row, synthetic):
        self.counts["taken"] += 1
        self.counts["synthetic"] += synthetic
        self.index.writerow(row)

    def reject(self, path, reason):
        self.counts["rejected"] += 1
        self.rejected.writerow([path, reason])

    def miss(self):
        self.counts["missing"] += 1

    def save(self):
        """From here on, an interrupted run goes on at this image."""
        for file in self.files:
            file.flush()
        ends = [os.path.getsize(part) for part in self.parts]
        write_json(self.path, {"settings": self.settings, **self.counts, "ends": ends})

    def finish(self):
        """The tables under their own names; see the top of the file."""
        for file in self.files:
            file.close()
        for part, path in zip(self.parts, self.tables):
            with whole_file(path) as temporary:
                shutil.copyfile(part, temporary)
        self.path.unlink()
        for part in self.parts:
            part.unlink()
