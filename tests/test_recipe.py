import pytest

from lbw_rl import authority
from lbw_rl.envs.recipe import (
    Recipe,
    RecipeError,
    known_recipes,
    load_recipe,
    override,
    recipe_from_dict,
)


@pytest.fixture(scope="module")
def mini() -> Recipe:
    return load_recipe("mini-qwen2")


def refusal(function, *args) -> str:
    with pytest.raises(RecipeError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    return message


@pytest.mark.parametrize("name", known_recipes())
def test_every_shipped_recipe_loads_under_its_own_name(name):
    assert load_recipe(name).name == name


def test_the_mini_recipes_are_shipped():
    assert {"mini-qwen2", "mini-llama"} <= set(known_recipes())


def test_every_field_of_every_section_is_described():
    sections = [Recipe, *(f.annotation for f in Recipe.model_fields.values() if hasattr(f.annotation, "model_fields"))]
    assert len(sections) == 8
    undescribed = [f"{s.__name__}.{n}" for s in sections for n, f in s.model_fields.items() if not f.description]
    assert undescribed == []


def test_a_recipe_survives_the_trip_through_json_and_dict(mini):
    assert Recipe.model_validate_json(mini.model_dump_json()) == mini
    assert recipe_from_dict(mini.model_dump()) == mini


def test_loads_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[model]\narchitecture = "llama"\n[authority]\nmax_skips = 3\n')
    recipe = load_recipe(path)
    assert recipe == load_recipe(str(path))
    assert recipe.train.steps == 300
    # One stated bound leaves the others at the recipe's defaults, not at those of a bare Authority().
    assert recipe.authority == authority.Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), max_skips=3)


def test_unknown_names_list_the_known_ones(tmp_path):
    assert "did you mean 'mini-qwen2'" in refusal(load_recipe, "mini-qwen")
    for source in ("no-such-recipe", str(tmp_path / "absent.toml"), tmp_path):
        assert ", ".join(known_recipes()) in refusal(load_recipe, source)


def test_malformed_files_are_refused(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("name = ")
    assert "not a valid TOML file" in refusal(load_recipe, path)
    path.write_bytes(b'name = "\xff"')
    assert "not a valid TOML file" in refusal(load_recipe, path)


@pytest.mark.parametrize(
    ("assignment", "field", "expected"),
    [
        ("train.steps=10", "train.steps", 10),
        (" train.seed = 3 ", "train.seed", 3),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.betas=[0.9, 0.95]", "optimizer.betas", (0.9, 0.95)),
        ("optimizer.grad_clip=1.0", "optimizer.grad_clip", 1.0),
        ("optimizer.grad_clip=0", "optimizer.grad_clip", None),
        ("optimizer.grad_clip=none", "optimizer.grad_clip", None),
        ("train.threads=1", "train.threads", 1),
        ("train.threads=none", "train.threads", None),
        ("train.measure_device=false", "train.measure_device", False),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("data.corpus=books/a=b.txt", "data.corpus", "books/a=b.txt"),
        ('name="quoted"', "name", "quoted"),
        ("authority.lr_scale=[0.1, 3]", "authority.lr_scale", (0.1, 3.0)),
        ("controller.options.target=0.04", "controller.options", {"target": 0.04}),
        ("model.path=some/folder", "model.architecture", None),
    ],
)
def test_overrides(mini, assignment, field, expected):
    node = override(mini, [assignment])
    for part in field.split("."):
        node = getattr(node, part)
    assert node == expected
    assert type(node) is type(expected)


def test_overrides_add_up_and_leave_the_original_alone(mini):
    changed = override(mini, ["train.steps=10", "train.steps=12", "model.path=x", "model.architecture=llama"])
    assert changed.train.steps == 12
    assert (changed.model.architecture, changed.model.path) == ("llama", None)
    assert mini.train.steps == 300


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("train.steps", ["'train.steps'", "section.field=value"]),
        ("=3", ["section.field=value"]),
        ("no.such.key=1", ["no.such.key: unknown key", "model", "train"]),
        ("train.stps=1", ["train.stps: unknown key", "did you mean train.steps?", "train.batch_size"]),
        ("train.steps.x=1", ["train.steps is a single value"]),
        ("train=1", ["train: is a section", "train.steps"]),
        ("controller.options=1", ["controller.options: is a section", "controller.options.NAME"]),
        ("authority.lr_scal=1", ["did you mean authority.lr_scale?"]),
        ("train.steps=ten", ["train.steps", "'ten'", "should be a valid integer", "optimizer steps"]),
        ('train.steps="10"', ["train.steps", "'10'", "should be a valid integer"]),
        ("train.seed=true", ["train.seed", "True", "should be a valid integer"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1"]),
        ("train.lr_multiplier=inf", ["train.lr_multiplier", "finite"]),
        (
            "optimizer.name=lion",
            ["optimizer.name", "'lion'", "'adamw', 'sgd', 'adafactor', 'stable-adamw', 'schedule-free' or 'prodigy'"],
        ),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1", "1.5", "less than 1"]),
        ("optimizer.grad_clip=-1", ["optimizer.grad_clip", "-1", "greater than 0", "'none'"]),
        ("model.architecture=gpt", ["model.architecture", "'qwen2' or 'llama'"]),
        ("model.architecture=none", ["model: needs exactly one of architecture", "path"]),
        ("model.num_heads=3", ["model: hidden_size 64", "num_heads 3"]),
        ("model.num_kv_heads=3", ["model: num_kv_heads 3 must divide num_heads 4"]),
        ("data.tokenizer=model", ["data.tokenizer 'model' needs model.path", "'bpe'"]),
        ("data.folder=x", ["data: folder goes with corpus 'wikitext-2'", "'python-docs'"]),
        ("authority.lr_scale=[2, 3]", ["authority.lr_scale", "(2.0, 3.0)", "low <= 1 <= high"]),
    ],
)
def test_refused_overrides_name_field_value_and_what_is_accepted(mini, assignment, parts):
    message = refusal(override, mini, [assignment])
    assert [p for p in parts if p not in message] == [], message


def test_an_option_below_a_single_value_is_refused(mini):
    changed = override(mini, ["controller.options.a=1"])
    assert "a holds the single value 1" in refusal(override, changed, ["controller.options.a.b=2"])


def test_fused_adafactor_is_refused(mini):
    message = refusal(override, mini, ["optimizer.name=adafactor", "optimizer.implementation=fused"])
    assert message.startswith("optimizer: implementation 'fused'")


def test_refused_dicts():
    assert refusal(recipe_from_dict, {"name": "a"}).startswith("model: is missing")
    unknown = {"name": "a", "model": {"architecture": "llama", "layers": 3}}
    assert refusal(recipe_from_dict, unknown).startswith("model.layers: unknown key; accepted: model.architecture")
    both = {"name": "a", "model": {"architecture": "llama", "path": "x"}}
    assert "exactly one" in refusal(recipe_from_dict, both)
