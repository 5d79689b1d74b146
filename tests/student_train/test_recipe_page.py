"""docs/recipes.md has every key of a recipe, as the code has it."""

import ast
from itertools import pairwise
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SECTIONS = {"Recipe": "", "OptimConfig": "optim.", "LossConfig": "loss."}


def written(value: object) -> str:
    """As YAML has it."""
    return str(yaml.safe_dump(value)).removesuffix("...\n").strip()


def rows() -> list[str]:
    """`| key | default | meaning |` of each field that is no section."""
    tree = ast.parse((ROOT / "student_train" / "config.py").read_text())
    found = []
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, prefix in SECTIONS.items():
        body = classes[name].body
        for field, text in pairwise(body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
                continue
            if ast.unparse(field.annotation) in SECTIONS:
                continue
            default = "required" if field.value is None else written(ast.literal_eval(field.value))
            meaning = " ".join(ast.literal_eval(text.value).split()).replace("|", "\\|")
            key = f"{prefix}{ast.unparse(field.target)}"
            found.append(f"| `{key}` | {default} | {meaning} |")
    return found


def test_the_page_has_every_key_with_its_default_and_its_meaning() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()

    wanted = rows()

    assert len(wanted) > 30
    assert "\n".join(wanted) in page
