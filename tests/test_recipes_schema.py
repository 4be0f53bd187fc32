"""What a recipe may say, and what is said of one that is wrong: whole messages."""

import dataclasses
import os
from pathlib import Path

import pytest
import yaml
from recipe_cases import EDITS, FILES, GOOD, OVERRIDES, RICH

from pacswap.errors import RecipeError
from pacswap.recipes import (
    GuidanceSection,
    KernelSection,
    LayerQuerySection,
    Recipe,
    copy_recipe,
    dump_recipe,
    find_recipe,
    library,
    load_recipe,
    recipe_data,
    recipe_schema,
    shipped_recipes,
    summary,
)
from pacswap.recipes.sections import Section
from pacswap.surgery.spec import Group, GuidanceSpec, KernelSpec, LayerQuery


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text, *overrides):
    Path("recipe.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe("recipe.yaml", overrides)


def message(text, *overrides):
    with pytest.raises(RecipeError) as raised:
        load(text, *overrides)
    return str(raised.value)


@pytest.mark.parametrize("case", EDITS)
def test_faults_of_a_recipe(case):
    old, new, expected = EDITS[case]
    assert GOOD.count(old) >= 1
    assert message(GOOD.replace(old, new, 1)) == expected


@pytest.mark.parametrize("case", FILES)
def test_faults_of_a_file(case):
    raw, expected = FILES[case]
    assert message(raw) == expected


@pytest.mark.parametrize("case", OVERRIDES)
def test_faults_of_overrides(case):
    overrides, expected = OVERRIDES[case]
    assert message(GOOD, *overrides) == expected


def test_the_syntax_is_checked_before_overrides():
    assert message("[", "model.weigths=null").startswith("recipe.yaml:1:2: not YAML: ")


def test_a_flood_of_faults_is_cut():
    lines = message("".join(f"k{i}: 1\n" for i in range(300))).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (
        102,
        "recipe.yaml has 303 faults:",
        "... and 203 more.",
    )


def test_no_such_file():
    with pytest.raises(RecipeError) as raised:
        load_recipe("none.yaml")
    assert (
        str(raised.value) == "none.yaml: no such file. List the shipped recipes: pacswap ls recipes"
    )


def test_a_folder_is_not_a_recipe(tmp_path):
    with pytest.raises(RecipeError) as raised:
        load_recipe("/")
    assert str(raised.value) == "/: cannot be read (Is a directory). Name a YAML file."


def test_what_a_good_recipe_says():
    recipe = load(GOOD).recipe
    assert recipe.model.args == {"num_classes": 21}
    assert recipe.model.weights_file is None
    assert [stage.lr for stage in recipe.finetune.stages] == [
        0.001,
        {"default": 0.0001, "added": 0.001},
    ]
    assert recipe.swap[0].to_group("swap") == Group(
        ("backbone.layer4.2.conv2",),
        GuidanceSpec("backbone.layer1", 16),
        KernelSpec(normalize="none"),
    )


def test_what_a_rich_recipe_says():
    recipe = load(RICH).recipe
    assert recipe.model.weights_file == "../w.safetensors"
    assert [group.to_group("swap") for group in recipe.swap] == [
        Group(
            LayerQuery("Conv2d", (3, 5), 1, last_of_stage=True, exclude=("a*", "b")),
            GuidanceSpec(("input", "re:layer[12]")),
        ),
        Group(
            ("x.*", LayerQuery(depthwise=False)),
            GuidanceSpec("input"),
            KernelSpec(bandwidth=1.0),
            override=True,
        ),
    ]


@pytest.mark.parametrize(
    ("section", "spec", "required"),
    [
        (KernelSection, KernelSpec(), {}),
        (GuidanceSection, GuidanceSpec("x"), {"from": "x"}),
        (LayerQuerySection, LayerQuery(), {}),
    ],
    ids=["kernel", "guidance", "query"],
)
def test_defaults_are_those_of_surgery(section, spec, required):
    assert set(section.model_fields) == {field.name for field in dataclasses.fields(spec)}
    assert section.model_validate(required).to_spec() == spec


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("1.0e-3", 0.001), ("+.5", 0.5), ("2.", 2.0),
        ("-.INF", float("-inf")), ("010", 10), ("0x1F", 31), ("0o17", 15), ("-7", -7),
        ("on", "on"), ("yes", "yes"), ("Off", "Off"), ("True", True), ("~", None), ("", None),
        ("'1'", "1"), ("1_000", "1_000"), ("12:30:45", "12:30:45"), ("2024-01-02", "2024-01-02"),
    ],
)  # fmt: skip
def test_scalars_of_yaml_1_2(written, value):
    read = load(GOOD.replace("21", written)).recipe.model.args["num_classes"]
    assert (read, type(read)) == (value, type(value))


def test_an_alias_stands_for_a_copy():
    loaded = load(GOOD.replace("21", "&n {a: 1}, other: *n"), "model.args.other.a=2")
    assert loaded.recipe.model.args == {"num_classes": {"a": 1}, "other": {"a": 2}}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm():
    assert load(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()).recipe == load(GOOD).recipe


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.weights=null", "weights", None),
        ("model.weights=a=b=c.pth", "weights", "a=b=c.pth"),
        ("model.args.sub.x=[1, 1e-3]", "args", {"num_classes": 21, "sub": {"x": [1, 0.001]}}),
        ("model.args={}", "args", {}),
    ],
)
def test_overrides_set_values(override, path, value):
    assert getattr(load(GOOD, override).recipe.model, path) == value


@pytest.mark.parametrize("key", ["swap[0].kernel.blend", "swap.0.kernel.blend"])
def test_overrides_reach_into_lists(key):
    assert load(GOOD, f"{key}=1e-1").recipe.swap[0].kernel.blend == 0.1


def test_overrides_add_sections_and_the_last_one_wins():
    recipe = load(GOOD, "calibration.images=a", "calibration.images=b").recipe
    assert recipe.calibration.images == "b"


def test_an_override_mends_a_fault_of_the_file():
    assert load(GOOD.replace("16", "0"), "swap[0].guidance={from: x}").recipe.swap[0].guidance == (
        GuidanceSection.model_validate({"from": "x"})
    )


def test_where_points_into_the_file_and_at_overrides():
    loaded = load(GOOD, "model.weights=null")
    assert loaded.where() == "recipe.yaml:1:1"
    assert loaded.where(("swap", 0, "layers", 0)) == "recipe.yaml:8:14"
    assert loaded.where(("swap", 0, "override")) == "recipe.yaml:8:5"
    assert loaded.where(("model", "weights")) == "override 'model.weights=null'"


@pytest.mark.parametrize("text", [GOOD, RICH], ids=["good", "rich"])
def test_dump_round_trips(text):
    recipe = load(text).recipe
    dumped = dump_recipe(recipe)
    assert load(dumped).recipe == recipe
    assert "standardize: true" in dumped  # neither of them says so


def test_dump_is_read_alike_by_yaml_1_1():
    recipe = load(RICH).recipe
    assert yaml.safe_load(dump_recipe(recipe)) == yaml.safe_load(
        yaml.safe_dump(recipe_data(recipe))
    )


def test_dump_refuses_objects():
    recipe = load(GOOD).recipe
    recipe.model.args["x"] = object()
    with pytest.raises(RecipeError) as raised:
        dump_recipe(recipe)
    assert str(raised.value) == "model.args: expected plain YAML data, got object."


def fits(data, schema, root):
    """As much of JSON Schema as pydantic writes for recipes."""
    if "$ref" in schema:
        return fits(data, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    for word, enough in (("anyOf", any), ("allOf", all), ("oneOf", lambda hits: sum(hits) == 1)):
        if word in schema and not enough(fits(data, branch, root) for branch in schema[word]):
            return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    kind = kinds[schema["type"]] if "type" in schema else object
    if not isinstance(data, kind) or (isinstance(data, bool) and kind not in (bool, object)):
        return False
    if data not in schema.get("enum", [schema.get("const", data)]):
        return False
    if isinstance(data, dict):
        known, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(data) and all(
            fits(value, known[key], root)
            if key in known
            else (fits(value, extra, root) if isinstance(extra, dict) else extra)
            for key, value in data.items()
        )
    if isinstance(data, list):
        parts = schema.get("prefixItems", [schema.get("items", {})] * len(data))
        return schema.get("minItems", 0) <= len(data) <= schema.get("maxItems", 99) and all(
            fits(value, part, root) for value, part in zip(data, parts, strict=True)
        )
    if isinstance(data, int | float) and not isinstance(data, bool):
        return schema.get("minimum", data) <= data <= schema.get("maximum", data) and data > (
            schema.get("exclusiveMinimum", data - 1)
        )
    return len(data) >= schema.get("minLength", 0) if isinstance(data, str) else True


# What needs a look at two keys, or into a text, is beyond the schema.
IN_SCHEMA = [
    "misspelt key", "misspelt required key", "unknown key", "missing key", "newer version",
    "choice", "number for text", "empty text", "args not a mapping", "two of three sizes", "size 0",
    "channels 0", "text for number", "guidance a number", "guidance list entry", "layers null",
    "layers entry", "kernel_size", "bandwidth 0", "bandwidth word", "no swap", "lr 0", "flip 2",
]  # fmt: skip


@pytest.mark.parametrize("text", [GOOD, RICH], ids=["good", "rich"])
def test_json_schema_accepts(text):
    data = load(text).recipe.model_dump(by_alias=True, mode="json", exclude_unset=True)
    assert fits(data, recipe_schema(), recipe_schema())


@pytest.mark.parametrize("case", IN_SCHEMA)
def test_json_schema_refuses(case):
    data = yaml.safe_load(GOOD.replace(*EDITS[case][:2], 1).replace("1e-", "1.0e-"))
    assert not fits(data, recipe_schema(), recipe_schema())


def test_json_schema_names_itself():
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "pacswap recipe"
    assert "from" in schema["$defs"]["GuidanceSection"]["properties"]


@pytest.mark.parametrize("section", [Recipe, *Section.__subclasses__()], ids=lambda s: s.__name__)
def test_every_key_is_described(section):
    assert all(text.endswith(".") and len(text) > 5 for text in section.keys().values())


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("fcn", "deeplab"):
        (folder / f"{name}.yaml").write_text(f"# Swap {name}.\n{GOOD}")
    monkeypatch.setattr(library, "shipped_folder", lambda: folder)
    return folder


def test_the_shipped_recipes_lie_in_the_checkout():
    assert library.shipped_folder() == Path(__file__).parents[1] / "recipes"


def test_shipped_recipes(shipped):
    assert shipped_recipes() == {
        "deeplab": shipped / "deeplab.yaml",
        "fcn": shipped / "fcn.yaml",
    }


def test_find_prefers_a_path(shipped):
    Path("fcn").mkdir()
    assert find_recipe("fcn") == find_recipe("fcn.yaml") == shipped / "fcn.yaml"
    Path("fcn.yaml").write_text(GOOD)
    assert find_recipe("fcn.yaml") == Path("fcn.yaml")


def test_find_names_what_is_near(shipped):
    with pytest.raises(RecipeError) as raised:
        find_recipe("deeplap.yaml")
    assert str(raised.value) == (
        "no recipe 'deeplap.yaml': neither a file nor a shipped recipe. Nearest: 'deeplab'. "
        "List them: pacswap ls recipes"
    )


def test_summary_is_the_first_comment(shipped):
    Path("rich.yaml").write_text(RICH)
    Path("bare.yaml").write_text("version: 1\n# later\n")
    assert [summary(path) for path in (shipped / "fcn.yaml", "rich.yaml", "bare.yaml")] == [
        "Swap fcn.",
        "Everything that a recipe can say.",
        "",
    ]


def test_copy(shipped):
    Path("folder").mkdir()
    assert copy_recipe("fcn", "mine.yaml") == Path("mine.yaml")
    assert copy_recipe("fcn", "folder") == Path("folder/fcn.yaml")
    assert {path.read_text() for path in (Path("mine.yaml"), Path("folder/fcn.yaml"))} == {
        (shipped / "fcn.yaml").read_text()
    }
    assert list(Path("folder").iterdir()) == [Path("folder/fcn.yaml")]
    Path("plain").touch()
    assert Path("mine.yaml").stat().st_mode == Path("plain").stat().st_mode


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_copy_never_overwrites(shipped, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
        assert copy_recipe("fcn", "new.yaml").read_bytes() == find_recipe("fcn").read_bytes()
    Path("mine.yaml").write_text("mine")
    with pytest.raises(RecipeError) as raised:
        copy_recipe("fcn", "mine.yaml")
    assert str(raised.value) == "mine.yaml exists and is not overwritten. Name another file."
    assert Path("mine.yaml").read_text() == "mine"
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("none/", "none/: no such folder. Make it, or name the new file."),
        (
            "none/a.yaml",
            "none/a.yaml: cannot be written (No such file or directory). Name another file.",
        ),
    ],
    ids=["folder", "file"],
)
def test_copy_to_no_folder(shipped, destination, expected):
    with pytest.raises(RecipeError) as raised:
        copy_recipe("fcn", destination)
    assert str(raised.value) == expected
