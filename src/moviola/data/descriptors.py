"""Classes told by descriptions: "a photo of a lynx. which has tufted ears".

Axis letters: C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moviola.types import UsageError

_VERB = dict.fromkeys(("has", "often", "typically", "may", "can"), "")
_VERB |= dict.fromkeys(("a", "an", "used"), "is ")


def sentences(name: str, descriptors: Sequence[str], templates: Sequence[str]) -> list[str]:
    """A class in every template with every descriptor after it, or the templates alone where it has none.

    The descriptor's first word decides between "which", "which is" and "which has". It follows the
    template's full stop, as in the sentences GRAIN and others were measured with.
    """
    kept = [descriptor.strip() for descriptor in descriptors if descriptor.strip()]
    ends = [f" which {_VERB.get(text.split()[0].lower(), 'has ')}{text}" for text in kept]
    return [template.format(name) + end for end in ends or [""] for template in templates]


def class_vectors(
    embed: Callable[[list[str]], np.ndarray],
    classes: Mapping[str, Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
) -> np.ndarray:
    """Each class by its descriptors: vectors_CD, the mean over templates and descriptors, as it is.

    `classes` maps a name to its descriptors. `embed` gives normalised rows: a loaded model's
    `embed_texts`. A picture belongs to the class with the largest dot product.
    """
    bare = [template for template in templates if "{}" not in template]
    if not classes or not templates or bare:
        raise UsageError(
            f"Class vectors need a class, and templates with {{}} for its name, got {len(classes)} classes "
            f"and {list(templates)}."
        )
    return np.stack([embed(sentences(name, said, templates)).mean(axis=0) for name, said in classes.items()])
