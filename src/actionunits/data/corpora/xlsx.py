"""Read and write one sheet of text and numbers in Excel's file format, without another library."""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from actionunits.data.corpora.reading import naming

_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def read_sheet(path: Path) -> Iterator[dict[str, str]]:
    """Rows of the first sheet (.xlsx) or of a .csv file as dictionaries by column.

    Raises:
        ValueError: The file is neither.
    """
    if path.suffix.lower() == ".csv":
        with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
            table = list(csv.reader(file))
    else:
        table = _read_xlsx(path)
    header = [name.strip() for name in table[0]] if table else []
    for row in table[1:]:
        cells = [*row, *[""] * (len(header) - len(row))]
        yield {name: cell.strip() for name, cell in zip(header, cells, strict=False) if name}


def write_sheet(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Write one sheet of text and numbers."""
    lines = []
    for r, row in enumerate(rows, start=1):
        cells = "".join(_cell(f"{_letters(c)}{r}", value) for c, value in enumerate(row) if value != "")
        lines.append(f'<row r="{r}">{cells}</row>')
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{office}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="rId1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f"<worksheet {main}><sheetData>{''.join(lines)}</sheetData></worksheet>",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>' + text)


def _read_xlsx(path: Path) -> list[list[str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            shared = _shared_strings(archive)
            name = min(n for n in archive.namelist() if re.fullmatch(r"xl/worksheets/sheet[0-9]+\.xml", n))
            sheet = ElementTree.fromstring(archive.read(name))
        return [_cells(row, shared) for row in sheet.iter(f"{_MAIN}row")]
    except (zipfile.BadZipFile, ElementTree.ParseError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is no .xlsx file ({error}); save it as .xlsx or .csv.") from error


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
    return [_text(item) for item in root.iter(f"{_MAIN}si")]


def _cells(row: ElementTree.Element, shared: list[str]) -> list[str]:
    found: dict[int, str] = {}
    for cell in row.iter(f"{_MAIN}c"):
        column = _column(cell.get("r", "")) if cell.get("r") else len(found)
        value = cell.find(f"{_MAIN}v")
        if cell.get("t") == "s" and value is not None:
            found[column] = shared[int(value.text or 0)]
        elif cell.get("t") == "inlineStr":
            found[column] = _text(cell)
        else:
            found[column] = (value.text or "") if value is not None else ""
    return [found.get(i, "") for i in range(max(found, default=-1) + 1)]


def _text(element: ElementTree.Element) -> str:
    return "".join(part.text or "" for part in element.iter(f"{_MAIN}t"))


def _column(reference: str) -> int:
    """The index of a cell's column: "AB12" -> 27."""
    number = 0
    for letter in re.sub(r"[^A-Z]", "", reference.upper()):
        number = 26 * number + ord(letter) - 64
    return number - 1


def _letters(column: int) -> str:
    """The letters of a column: 27 -> "AB"."""
    quotient, rest = divmod(column, 26)
    return (_letters(quotient - 1) if quotient else "") + chr(65 + rest)


def _cell(reference: str, value: object) -> str:
    if isinstance(value, int | float):
        return f'<c r="{reference}"><v>{value}</v></c>'
    return f'<c r="{reference}" t="inlineStr"><is><t>{escape(str(value))}</t></is></c>'
