"""The words for the classes of ImageNet-1k."""

from avit_jax.data import class_names


def test_all_classes_have_words() -> None:
    table = class_names.imagenet()
    assert len(table) == 1000 and list(table) == sorted(table)
    assert all(name[0] == "n" and len(name) == 9 and words for name, words in table.items())
    assert list(table)[207] == "n02099601" and table["n02099601"] == "golden retriever"
    assert list(table)[999] == "n15075141" and "toilet paper" in table["n15075141"]


def test_other_names_stay_as_they_are() -> None:
    assert class_names.readable("n01440764") == "tench (n01440764)"
    for name in ("cat", "n00000000", "7", "a, b"):
        assert class_names.readable(name) == name
    assert class_names.words("cat") == "cat"


def test_names_of_classes() -> None:
    assert class_names.of_classes(["a"], 1000) == ("a",)
    assert class_names.of_classes((), 10) == ()
    assert class_names.of_classes((), 1000)[0] == "n01440764"
