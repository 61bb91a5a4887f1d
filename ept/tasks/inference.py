"""Inference of unset options from the rows: text and label columns, label words, metrics."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, pairwise
from typing import Any, Literal

from ..utils.messages import listed, shown
from .files import Row
from .metrics import OF_NUMBERS
from .rows import HIDDEN, is_missing, is_number, text_key
from .task import nearest_value, without_point

LABELS = ("label", "labels")
KINDS = ("class", "category", "sentiment", "stance", "verdict", "gold", "intent", "emotion", "topic")
"""Names of label columns; if a file has two of them, neither is clearly the one to learn."""
VALUES = ("target", "polarity", "stars", "rating", "score", "tag", "relation", "y")
"""Names of label columns if none has a name from `KINDS`: a `target` may be the thing that a stance is about."""
LABEL_NAMES = (*LABELS, *KINDS, *VALUES)
CLASS_NAMES = {"class", "category", "intent", "emotion", "topic", "tag", "relation", "code"}
"""Columns with these names hold classes, even if numbered, and not the numbers of a regression."""
ROW_NAMES = {"id", "ids", "idx", "index", "uid", "uuid", "guid"}
TEXT_NAMES = ("text", "sentence", "review", "content", "headline", "comment", "message", "tweet", "document")
SOURCE_NAMES = ("prompt", "question", "problem", "instruction", "dialogue", "article", *TEXT_NAMES, "source", "input")
"""Names of text columns to which a free-text answer is written."""
NEVER_READ = {"chosen", "rejected", "rationale", "solution", "explanation", "reasoning"}
"""Names of columns that hold other answers or give the answer away."""
NUMERALS = ("left", "right", "first", "second", "one", "two")
"""Words that distinguish the names of similar columns, besides numbers and single letters."""
SPLIT_NAMES = {"split", "set", "subset", "fold", "partition"}
PARTS = {"train", "training", "dev", "valid", "val", "validation", "test"}
TEXT_PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2")),
    *(("text_a", "text_b"), ("question", "passage"), ("question", "context"), ("question", "sentence")),
    *(("claim", "evidence"), ("query", "passage"), ("query", "document"), ("instruction", "input")),
    *(("instruction", "context"), ("question", "answer"), ("title", "description"), ("title", "content")),
    *(("title", "body"), ("subject", "body")),
)
MAX_LABELS = 200
MAX_NUMBER_LABELS = 20
"""Up to this many different whole numbers are labels; more, and all other numbers, make a regression."""
MAX_VALUES = 26  # of a regression, as many as STS-B has
MANY = 0.6
"""Macro-F1 is added to accuracy if the commonest label has more than this share of the rows."""
A_SENTENCE = 4  # words in a header cell that is a text and not a column's name
FEW = 5  # rows that a label needs to be in every split
NEARLY_ALL = 0.9
"""If this share of the different values are numbers, the column is numeric, with mistakes in it."""
_AS_PEOPLE_WRITE = re.compile(r"[+-]?(\d+([.,]\d+)?|\d{1,3}((,\d{3})+(\.\d+)?|(\.\d{3})+(,\d+)?)) ?%?")
_CODE = re.compile(r"[!-~]*[\d/@_][!-~]*")  # identifiers, addresses, file names: not text, however long
FREE_TEXT = "; for answers in free text give --target-template {column}"
LIKE_MISSING = {"nan", "na", "n/a", "null", "none", "-"}


@dataclass(frozen=True)
class Labels:
    """The labels of a column, and how to score them.

    Attributes:
        words: a list of words, or a mapping {raw label: word}; None for a regression.
        values: the numbers that a regression's classes stand for.
        notes: warnings for the user.
    """

    words: list[str] | dict[Any, str] | None
    values: list[float] | None
    metrics: list[str]
    notes: list[str]


def find_columns(
    rows: Sequence[Row], source: str, text_columns: Sequence[str] | None = None, label_column: str | None = None
) -> tuple[list[str], str]:
    """Finds the text columns and the label column, unless they are given.

    Tries the usual names first, then the content: the longest text, and the only other column with few different
    values. Raises ValueError if a given column is missing, or if no column or several could be the label.
    """
    columns = _columns(rows)
    _check_columns(columns, [*(text_columns or []), *([label_column] if label_column is not None else [])], source)
    own_value = any(name in values for name, values in columns.items())
    is_sentence = any(len(name.split()) >= A_SENTENCE for name in columns)
    if (own_value and is_sentence) or (label_column is None and text_columns is None and _is_a_row(columns)):
        raise ValueError(f"{source}: the first line holds a row, not names: put a line such as text,label above it")
    label = label_column or _find_label(columns, source, text_columns or ())
    texts = text_columns or _find_texts({name: found for name, found in columns.items() if name != label}, source)
    return list(texts), label


def find_texts(rows: Sequence[Row], source: str, text_columns: Sequence[str] | None = None) -> list[str]:
    """Finds the text columns of a task with free-text answers, unless they are given: by name, else the longest text.

    Raises ValueError as `find_columns` does.
    """
    columns = _columns(rows)
    _check_columns(columns, text_columns or (), source)
    if text_columns:
        return list(text_columns)
    own = {name: values for name, values in columns.items() if not _words(name) & NEVER_READ}
    few = {_plain(name) for name, values in own.items() if _has_few_values(values)}
    return _find_texts(own or columns, source, [name for name in SOURCE_NAMES if name not in few])


def unread_texts(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """Notes the other columns that hold text, not labels or identifiers, and are not read."""
    others = {name: values for name, values in _columns(rows).items() if name not in texts}
    unread = [n for n, v in others.items() if _is_text(v) and not _are_codes(v) and not _has_few_values(v)]
    if not unread:
        return []
    remedy = "if the answer depends on them, name every column to read with --text-column"
    return [f"of the text columns only {_quoted(texts)} is read, not {_quoted(unread)}: {remedy}"]


def split_notes(rows: Sequence[Row]) -> list[str]:
    """Notes a column that names splits: the splits of a single file are drawn whatever it says."""
    named = [name for name in _names(rows) if _plain(name) in SPLIT_NAMES]
    names = [name for name in named if len({str(row.get(name)).casefold() for row in rows} & PARTS) > 1]
    remedy = "to use it, put the rows into a folder with train, validation and test files"
    return (
        [f"column {_quoted(names)} does not decide which rows are held out, they are drawn: {remedy}"] if names else []
    )


def _check_columns(columns: Mapping[str, list[Any]], names: Sequence[str], source: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{source}: column '{twice}' is named twice: name each column once, as text or as label")
    for name in names:
        if name not in columns:
            raise ValueError(f"{source}: no column '{name}'; columns found: {_quoted(columns)}")


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows if not is_missing(row.get(name))] for name in _names(rows)}


def _names_rows(name: str) -> bool:
    """Checks whether a column's name is that of a row identifier, such as `user_id` but not `Class Index`."""
    return bool(_words(name) & ROW_NAMES) and not _words(name) & {*LABEL_NAMES}


def _is_a_row(columns: Mapping[str, list[Any]]) -> bool:
    """Checks whether the header is really a first row of short texts: a name is a frequent value of its own column."""
    usual = {*LABEL_NAMES, *ROW_NAMES, *TEXT_NAMES, *chain(*TEXT_PAIRS)}
    if any(_words(name) & usual for name in columns):
        return False
    return any([*map(str, values)].count(name) >= len(values) / 20 for name, values in columns.items() if values)


def _find_label(columns: Mapping[str, list[Any]], source: str, texts: Sequence[str]) -> str:
    others = [name for name in columns if name not in texts]
    by_name = {_plain(name): name for name in reversed(others)}
    usable = [name for name in others if _has_few_values(columns[name])]
    kinds = [by_name[name] for name in KINDS if name in by_name]
    kinds = [name for name in kinds if name in usable] or kinds
    if found := next((by_name[name] for name in LABELS if name in by_name), None):
        return found
    if len(kinds) == 1:
        return kinds[0]
    if found := next((by_name[name] for name in VALUES if name in by_name and not kinds), None):
        return found
    if len(columns) == 2 and others and not kinds:  # the shorter of two columns
        shorter = min(others, key=lambda name: _length(columns[name]))
        if not _names_rows(shorter):
            return shorter
    longest = max(others, key=lambda name: _length(columns[name]), default=None)
    few = [name for name in usable if (name != longest or texts) and not _names_rows(name)]
    if any(_plain(name) in ("answer", "answers") and name not in few for name in others):
        few = []  # these are what the answers are about, such as the title of an article
    named = [name for name in few if _words(name) & {*LABELS, *KINDS}]
    if not named and not any(_is_text(columns[name]) for name in few if not _words(name) & {*VALUES}):
        named = [name for name in few if _words(name) & {*VALUES}]
    candidates = kinds or (named if len(named) == 1 else few)
    if len(candidates) == 1:
        return candidates[0]
    which = f"{_quoted(candidates)} could each be" if candidates else f"none of {_quoted(columns)} looks like"
    remedy = "name its column with --label-column (data.label_column)" + ("" if candidates else FREE_TEXT)
    if nested := [name for name in others if any(isinstance(value, (list, dict)) for value in columns[name])]:
        remedy += f"; labels inside {_quoted(nested)} need columns of their own, one row per label"
    raise ValueError(f"{source}: {which} the label: {remedy}")


def _find_texts(columns: Mapping[str, list[Any]], source: str, names: Sequence[str] = TEXT_NAMES) -> list[str]:
    by_name = {_plain(name): name for name in reversed(list(columns))}
    most = max(map(len, columns.values()), default=0)
    for pair in TEXT_PAIRS:
        if all(name in by_name for name in map(_plain, pair)):
            return [by_name[_plain(name)] for name in pair]
    if found := next((by_name[n] for n in names if n in by_name and 2 * len(columns[by_name[n]]) > most), None):
        return [found]
    textual = [name for name, values in columns.items() if _is_text(values)]
    if not textual:
        remedy = "name it with --text-column (data.text_columns)"
        raise ValueError(f"{source}: none of {_quoted(columns) or 'no columns'} holds text: {remedy}")
    read = [name for name in textual if not _are_codes(columns[name])]
    longest = max(read or textual, key=lambda name: _length(columns[name]))
    if shape := next((type(v).__name__ for v in columns[longest] if isinstance(v, (list, dict))), None):
        remedy = "flatten it to a string, or name the columns to read with --text-column (data.text_columns)"
        raise ValueError(f"{source}: column '{longest}', the longest, holds a {shape}, not text: {remedy}")
    return [name for name in textual if _series(name) == _series(longest)]  # and similar ones: headline_a, headline_b


def unread_notes(rows: Sequence[Row], texts: Sequence[str], label: str, words: Collection[str]) -> list[str]:
    """Notes columns that the labels seem to depend on as well, if the user named no text columns.

    These are choices (the label is the number or letter of one), or the question that such choices answer; columns that
    hold a word or part of the text; and, if many rows have the same text and different labels, any other text column.

    Args:
        words: of a classification's labels; empty for a regression.
    """
    columns = {name: found for name, found in _columns(rows).items() if name not in texts and name != label}
    textual = [name for name, found in columns.items() if _is_text(found)]
    sizes = Counter(map(_series, textual))

    def is_choice(name: str) -> bool:
        lists = any(isinstance(value, (list, dict)) and _is_text([value]) for value in columns[name])
        return lists or name in words or (name in textual and sizes[_series(name)] > 1)

    remedy = "name every column to read with --text-column (of a list, make columns of its items first)"
    notes, points = [], bool(words) and all(re.fullmatch("[0-9A-Za-z]", word) for word in words)
    if len(texts) == 1 and points and (choices := list(filter(is_choice, columns))):
        what = f"{_quoted(choices)}, which the model does not read"
        notes.append(f"the labels {_quoted(words)} may be the numbers or letters of choices in {what}: {remedy}")
    is_pair = {*map(_plain, texts)} in [{*map(_plain, pair)} for pair in TEXT_PAIRS]
    asked = [name for name in textual if not _are_codes(columns[name])]
    if points and len(texts) == len(words) and not is_pair and asked:
        what = f"{_quoted(texts)} as answers to {_quoted(asked)}, which the model does not read"
        notes.append(f"the labels {_quoted(words)} may be the numbers or letters of {what}: {remedy}")
    if not notes and (parts := [name for name in textual if _holds_parts(rows, name, texts)]):
        what = f"{_quoted(parts)}, which the model does not read: nearly every row has part of its text there"
        notes.append(f"the labels may be about {what}: {remedy}")
    labels_of: dict[str, Counter[Any]] = defaultdict(Counter)
    for row in rows:
        if not is_missing(row.get(label)):
            labels_of[text_key("\n".join(str(row.get(name)) for name in texts))][_written(row[label])] += 1
    torn = sum(sum(counts.values()) for counts in labels_of.values() if len(counts) > 1)
    if not notes and torn > len(rows) / 10 and textual:
        what = f"{_quoted(textual)}, which the model does not read, may tell them apart"
        notes.append(f"{torn} of {len(rows)} rows have a text that occurs with several labels, and {what}: {remedy}")
    return notes


def _holds_parts(rows: Sequence[Row], name: str, texts: Sequence[str]) -> bool:
    """Checks whether a column holds parts of the texts, such as the aspect that a sentiment is about."""
    found = []
    for row in rows[:1000]:
        if not is_missing(part := row.get(name)) and isinstance(part, str):
            key, whole = text_key(part), [text_key(str(row.get(text))) for text in texts]
            inside = any(re.search(rf"(?<![a-z0-9]){re.escape(key)}", text) for text in whole)  # or a prefix: aspect(s)
            found.append((key, inside and key not in whole))
    return len({key for key, _ in found}) > 1 and sum(inside for _, inside in found) >= NEARLY_ALL * len(found)


def _series(name: str) -> str:
    """Masks what distinguishes similar columns: `choice1` and `choice2`, `text_A` and `text_B`, `left_text` and ..."""
    return re.sub(rf"\d+|(?<![^\W_])([^\W_]$|(?i:{'|'.join(NUMERALS)})(?![^\W_]))", "#", name)


def _are_codes(values: Sequence[Any]) -> bool:
    return all(_CODE.fullmatch(str(value)) for value in values)


def _is_text(values: Sequence[Any]) -> bool:
    return any(map(_holds_text, values))


def _holds_text(value: Any, inside: bool = False) -> bool:
    """Checks whether a cell is not a number; for a list or an object, whether it contains a string."""
    if isinstance(value, (list, dict)):
        return any(_holds_text(part, True) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) if inside else not is_number(value)


def find_labels(
    rows: Sequence[Row],
    column: str,
    source: str,
    in_words: bool = True,
    kind: Literal["classification", "regression"] | None = None,
) -> Labels:
    """Finds the labels in a column, in a fixed order: rising numbers or sorted words.

    Numbers that are not whole, or more than 20 different ones, make a regression; numbers with leading zeros (`0101`)
    are codes, hence labels. A label's word is its text in the file, except that `1.0` becomes `1`. Raises ValueError
    for a column of lists, with no or only one label, with labels that look alike, with too many different labels, of
    numbers with a few other cells among them, or of numbers with decimal commas or percent signs.

    Args:
        in_words: the model writes rounded numbers; a note says what rounding loses.
        kind: treats the labels as classes, or as numbers, which they must then be. None: as they look.
    """
    if shape := next((type(v).__name__ for row in rows if isinstance(v := row.get(column), (list, dict))), None):
        raise ValueError(
            f"{source}: column '{column}' holds a {shape}, not one label per row: write a word or a number"
        )
    counts = Counter(_written(row.get(column)) for row in rows if not is_missing(row.get(column)))
    where = f"{source}: column '{column}'"
    if found := next(
        (raw for raw in counts if isinstance(raw, str) and re.fullmatch(r"\[(.*,.*|(['\"]).*\2)\]", raw, re.S)), None
    ):
        raise ValueError(f"{where} holds {shown(found)}, a list, not one label per row: write a word or a number")
    if not counts:
        raise ValueError(f"{where} is empty: there is no label to learn")
    notes = []
    if kind != "regression" and (hidden := _unlabelled(counts, kind)):
        many = sum(counts.pop(raw) for raw in hidden)
        notes.append(
            f"{many} rows have the label -1 beside 0 .. {len(counts) - 1}, which is taken to mean no label; if it is "
            "a label, list all labels in data.label_words"
        )
    total = sum(counts.values())
    numbers = {raw: float(raw) for raw in counts if is_number(raw) and not isinstance(raw, bool)}
    finite = len(numbers) == len(counts) and all(map(math.isfinite, numbers.values()))
    if not finite and kind == "regression":
        others = listed(shown(raw) for raw in counts if not math.isfinite(numbers.get(raw, math.nan)))
        raise ValueError(f"{where} holds {others}: a regression needs numbers, leave data.kind out")
    if not finite and kind is None:
        _check_numbers(list(counts), where)
    words = {raw: without_point(str(raw)) if finite or isinstance(raw, bool) else str(raw) for raw in counts}
    are_codes = any(re.fullmatch(r"0\d+", word) for word in words.values())
    low, high = (min(numbers.values()), max(numbers.values())) if finite else (0.0, 0.0)
    if low < high and kind != "classification" and (kind or not _are_labels(numbers.values(), are_codes)):
        values = _grid(sorted({*numbers.values()}))
        notes += _coarseness(counts, values) if in_words else []
        of_classes = [low + i for i in range(len(set(numbers.values())))]  # as in a column of class labels
        are_classes = sorted({*numbers.values()}) == of_classes and min(counts.values()) > 1
        are_whole = all(map(float.is_integer, numbers.values()))
        are_named = _words(column) & CLASS_NAMES and (low in (0, 1) or "code" in _words(column))
        come_often = _words(column) & {*LABEL_NAMES} and total >= 3 * len(numbers)
        if kind is None and ((low in (0, 1) and are_classes) or (are_whole and (are_named or come_often))):
            notes.append(
                f"column '{column}' holds the whole numbers {low:g} .. {high:g}, taken for the numbers of a "
                "regression: if they are classes, set data.kind=classification"
            )
        return Labels(None, values, list(OF_NUMBERS), notes)
    if set(map(str.casefold, words.values())) <= {"true", "false"}:
        words = {raw: word.casefold() for raw, word in words.items()}
    by_word = Counter[str]()
    for raw, word in words.items():
        by_word[word] += counts[raw]
    _check_labels(by_word, total, where)
    order = sorted(by_word, key=(lambda word: (Decimal(word), word)) if finite else str)
    if few := [f"{word!r} ({by_word[word]})" for word in order if by_word[word] < FEW]:
        notes.append(f"labels with fewer than {FEW} rows, which may be missing in a split: {listed(few)}")
    if several := _combinations(order):
        notes.append(
            f"labels that look like several at once: {listed(map(repr, several))}; each is learned and scored as one "
            "label"
        )
    if odd := [repr(word) for word in order if word.casefold() in LIKE_MISSING]:
        notes.append(f"a label that reads like a missing one: {listed(odd)}; if it means that, leave its cells empty")
    metrics = default_metrics(max(by_word.values()) / total)
    if {*order} == {"false", "true"}:  # a list is enough, 0 and 1 are known
        return Labels(order, None, metrics, notes)
    raws = sorted(words, key=lambda raw: (order.index(words[raw]), str(raw)))
    return Labels({raw: words[raw] for raw in raws}, None, metrics, notes)


def _combinations(words: Sequence[str]) -> list[str]:
    """Finds labels such as `Comedy|Drama` whose parts all occur in other labels too."""
    parts = {word: [part.strip() for part in re.split("[,;|/+&]", word)] for word in words}
    counts = Counter(part for of_word in parts.values() for part in set(of_word))
    return [word for word, of_word in parts.items() if len(of_word) > 1 and all(counts[part] > 1 for part in of_word)]


def _unlabelled(counts: Collection[Any], kind: str | None) -> list[Any]:
    """Finds -1 beside 0 .. n - 1, where it marks rows without a label; but -1, 0 and 1 alone are three labels.

    With more numbers than make labels, -1 counts as a number, unless `kind` says that they are labels.
    """
    hidden = [raw for raw in counts if str(raw) in HIDDEN]
    others = [raw for raw in counts if raw not in hidden]
    most = math.inf if kind == "classification" else MAX_NUMBER_LABELS
    if (
        not hidden
        or not 3 <= len(others) <= most
        or not all(is_number(raw) and not isinstance(raw, bool) for raw in others)
    ):
        return []
    return hidden if sorted(map(float, others)) == list(range(len(others))) else []


def _are_labels(numbers: Collection[float], are_codes: bool = False) -> bool:
    """Checks whether numbers are labels (few and whole, or codes) and not values of a regression."""
    few = len(set(numbers))
    return few == 1 or (all(map(float.is_integer, numbers)) and (are_codes or few <= MAX_NUMBER_LABELS))


def _check_numbers(raws: Sequence[Any], where: str) -> None:
    """Refuses a column that would be a regression but for a few cells, or but for how its numbers are written."""
    read = {raw: _read_number(raw) for raw in raws}
    numbers = [number for number in read.values() if number is not None]
    if len(numbers) < NEARLY_ALL * len(read) or _are_labels(numbers):
        return
    what, remedy = "numbers, except for", "correct these cells or leave them empty"
    odd = [shown(raw) for raw, number in read.items() if number is None]
    if not odd:
        what, remedy = "numbers that are written as", "write them like 1234.5, with no comma and no %"
        odd = [shown(raw) for raw in raws if not is_number(raw)]
    raise ValueError(f"{where} holds {what} {listed(odd)}: {remedy}, or list all labels in data.label_words")


def _read_number(raw: Any) -> float | None:
    """Reads a finite number, including the forms 1,5, 12 %, 1.234,5 and 1,234.5; None for anything else."""
    if isinstance(raw, str) and _AS_PEOPLE_WRITE.fullmatch(raw):
        *whole, last = re.split("[.,]", raw.rstrip("% "))
        raw = f"{''.join(whole)}.{last}" if whole else last
    if isinstance(raw, bool) or not is_number(raw):
        return None
    return float(raw) if math.isfinite(float(raw)) else None


def _check_labels(by_word: Counter[str], total: int, where: str) -> None:
    alike: dict[str, list[str]] = defaultdict(list)
    for word in by_word:
        alike[_as_seen(word)].append(word)
    if len(by_word) == 1:
        raise ValueError(f"{where} holds only one label, {shown(next(iter(by_word)))}: a task needs at least 2")
    if twins := next((words for words in alike.values() if len(words) > 1), None):
        common = max(twins, key=lambda word: (by_word[word], word))
        merged = {word: max(words, key=lambda w: (by_word[w], w)) for words in alike.values() for word in words}
        mapping = ", ".join(f"'{word}': '{other}'" for word, other in merged.items())
        pair = " and ".join(f"{word!r} ({by_word[word]} rows)" for word in twins)
        raise ValueError(
            f"{where}: labels {pair} differ only in case, blanks or invisible characters: write {common!r} for all, "
            f'or say which are one with --set "data.label_words={{{mapping}}}"'
        )
    if len(by_word) > MAX_LABELS or (len(by_word) > FEW and len(by_word) > total / 2):
        raise ValueError(
            f"{where} holds {len(by_word)} different values in {total} rows, too many for labels: "
            f"name the label's column with --label-column; list more than {MAX_LABELS} labels in data.label_words; "
            + FREE_TEXT.removeprefix("; ")
        )


def _as_seen(word: str) -> str:
    """Returns a key equal for labels that look alike: ignores case, blanks, invisible characters, accent forms."""
    composed = unicodedata.normalize("NFC", word)
    return text_key("".join(s for s in composed if unicodedata.category(s) != "Cf" and not "\ufe00" <= s <= "\ufe0f"))


def _grid(numbers: Sequence[float]) -> list[float]:
    """Divides the range of rising numbers evenly into about 26 values, as T5 divides STS-B's 0 to 5 in steps of 0.2.

    If the numbers fill half of an even grid, as half-star ratings do, that grid is used; otherwise a round step.
    """
    low, high = numbers[0], numbers[-1]
    step = min(after - before for before, after in pairwise(numbers))
    places, count = [(number - low) / step for number in numbers], round((high - low) / step) + 1
    if FEW <= len(numbers) <= count <= min(MAX_VALUES, 2 * len(numbers)) and all(
        abs(p - round(p)) < 1e-4 for p in places
    ):
        return [round(low + number * step, 10) for number in range(count)]
    least = (high - low) / (MAX_VALUES - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _coarseness(counts: Counter[Any], values: Sequence[float]) -> list[str]:
    """Notes that most rows of a regression, with different numbers, are rounded to one value."""
    by_value: dict[int | None, list[int]] = defaultdict(list)
    for raw, count in counts.items():
        by_value[nearest_value(raw, values)].append(count)
    index, most = max(by_value.items(), key=lambda item: sum(item[1]))
    total, rows = sum(counts.values()), sum(most)
    if index is None or rows <= total / 2 or rows - max(most) <= total / 10:  # mostly one number, such as 0
        return []
    return [
        f"{rows} of {total} rows, with {len(most)} different numbers, are rounded to {values[index]:g}, because few "
        f"rows reach the other values of {values[0]:g} .. {values[-1]:g}, and the scores are of rounded numbers: put "
        "the numbers' logarithm or rank into the column, cut off the extreme ones, or use a classifier, which "
        "rounds none"
    ]


def commonest_share(classes: Sequence[int | None]) -> float:
    """Computes the share of the commonest class among the rows that have one."""
    counts = Counter(index for index in classes if index is not None)
    return max(counts.values(), default=0) / max(sum(counts.values()), 1)


def default_metrics(share: float) -> list[str]:
    """Lists the metrics of a classification whose commonest label has this share of the rows."""
    return ["accuracy", "f1_macro"] if share > MANY else ["accuracy"]


def default_template(text_columns: Sequence[str], label_column: str, asks: bool) -> str:
    """Makes a template of columns: one stands alone, several get their names; `asks`: a last line names the label."""
    for column in text_columns:
        if column.strip() == "" or column.isdigit() or set(column) & set(".[]{}:!"):
            raise ValueError(f"column {column!r} cannot stand in a template: rename it to a plain word")
    single, named = "{" + text_columns[0] + "}", " ".join(f"{column}: {{{column}}}" for column in text_columns)
    template = single if len(text_columns) == 1 else named
    return template + ("\n" + label_column.replace("{", "{{").replace("}", "}}") + ":" if asks else "")


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _words(name: str) -> set[str]:
    return {*re.split(r"[\W_]+", name.casefold())}


def _quoted(names: Any) -> str:
    return listed(f"'{name}'" for name in names)


def _length(values: Sequence[Any]) -> int:
    return sum(len(str(value)) for value in values)  # in total: a column that is often empty counts as short


def _has_few_values(values: Sequence[Any]) -> bool:
    return 2 <= len(set(map(str, values))) <= min(MAX_LABELS, max(len(values) // 2, 2))


def _written(value: Any) -> Any:
    """Returns a raw label as in a mapping: stripped, and a whole number without a decimal point."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (bool, int, float)) else str(value)
