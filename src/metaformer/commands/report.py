"""Write the report of a run, or a comparison of several runs, as one HTML file that needs no network.

  python scripts/report.py runs/NAME                # writes runs/NAME/report.html
  python scripts/report.py runs/A runs/B runs/C     # writes comparison.html

The runs may still be in progress or may have been killed. Training writes its own report after each validation, and
adds pictures of the worst and best images at its end. This program adds missing ones if the data is readable.
"""

import argparse
from pathlib import Path

from metaformer.composing import compose_validation
from metaformer.errors import UserError, one_line, warn
from metaformer.files import check_output, write_text_atomically
from metaformer.reporting.config import ReportConfig
from metaformer.reporting.run_record import RunRecord, read_record
from metaformer.reporting.run_report import GENERATOR, REPORT_FILE, make_report


def main() -> None:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file to write, instead of the above")
    parser.add_argument("--price-per-hour", type=float, help="of one GPU; default: the run's report.price_per_hour")
    arguments = parser.parse_args()
    prices = ReportConfig(price_per_hour=arguments.price_per_hour)
    several = len(arguments.runs) > 1
    file = arguments.output or (Path("comparison.html") if several else arguments.runs[0] / REPORT_FILE)
    records = [read_record(folder) for folder in arguments.runs]
    check_output(f"--output={file}", file)
    if file.exists() and GENERATOR not in file.read_text(errors="replace"):
        raise UserError(f"--output={file}: exists and is not a report; remove it, or give another name")
    if not several and records[0].examples and not records[0].examples.have_pictures:
        records = [_with_pictures(records[0])]
    write_text_atomically(file, make_report(records, prices.price_per_hour))
    print(file)


def _with_pictures(record: RunRecord) -> RunRecord:
    """Add pictures to the worst and best images, and return the run's record again."""
    config = compose_validation(["checkpoint=last", "precision=fp32"])
    from metaformer import assembly, runtime  # takes seconds, which most reports need not wait for

    try:
        with runtime.start() as ranks:
            assembly.add_pictures_of_run(record.folder, record.folder / record.examples_file, config, ranks)
    except assembly.PICTURE_ERRORS as error:
        warn(f"the worst and best images are listed without pictures: {one_line(error)}")
    return read_record(record.folder)
