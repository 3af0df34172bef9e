"""Captions of scenes: their vocabulary, their tokens as tensors, and a CLIPTokenizer that agrees with them."""

import json
from pathlib import Path

import torch
from render import COLORS, TEXTURES, Scene
from scenes import uniform
from torch import Tensor

CLASSES = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
STYLES = {"serif": "serif", "sans": "sans", "mono": "typewriter", "script": "handwritten", "decorative": "fancy"}
SIZES, WEIGHTS = ("small", "medium", "large"), ("thin", "regular", "bold")
SLANTS, SHARPNESS = ("upright", "italic"), ("sharp", "soft", "blurry")
TURNS, MEDIA, KINDS = ("left", "straight", "right"), ("image", "picture", "photo"), ("uppercase", "lowercase")
FUNCTION = ("the", "of", "on", "letter", "digit", "character", "background", "turned", "between", "others", "alone")
# No article "a": it would be the letter a. Attributes come before the name, the surroundings after it.
TEMPLATES = ("the character {}", "image of the character {}", "the small character {}", "picture of the character {}")
WORDS = [*FUNCTION, *COLORS, *TEXTURES, *STYLES.values(), *SIZES, *WEIGHTS, *SLANTS, *SHARPNESS, *TURNS, *MEDIA, *KINDS]
LENGTH = 32  # positions of the text tower; the longest caption takes 25


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return a byte-pair vocabulary and its merges, in which every word above is a single token."""
    letters = sorted(set("".join(WORDS)) | set(CLASSES))
    tokens = {t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        pieces = _merged(pieces, merges)
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces = _merged([*word[:-1], word[-1] + "</w>"], merges)
    for merge in merges:
        tokens.setdefault(merge.replace(" ", ""), len(tokens))
    for special in ("<|startoftext|>", "<|endoftext|>"):  # the end last: older readers find it by its largest id
        tokens[special] = len(tokens)
    return tokens, merges


def _merged(pieces: list[str], merges: list[str]) -> list[str]:
    """Return a word's pieces after all merges in their order, as byte-pair encoding applies them."""
    for merge in merges:
        first, second = merge.split()
        i = 0
        while i < len(pieces) - 1:
            if pieces[i] == first and pieces[i + 1] == second:
                pieces[i : i + 2] = [first + second]
            i += 1
    return pieces


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and the tokenizer's other files as transformers saves a CLIPTokenizer."""
    from transformers import CLIPTokenizer

    tokens, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [tuple(m.split()) for m in merges]
    CLIPTokenizer(vocab=tokens, merges=pairs, model_max_length=LENGTH).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


class Captioner:
    """Captions for scenes of given faces, as token ids, drawn on the scene's device."""

    def __init__(self, styles: list[str], weights: list[int], upright: list[bool], device: torch.device) -> None:
        tokens, _ = vocabulary()
        self.begin, self.end = tokens["<|startoftext|>"], tokens["<|endoftext|>"]

        def ids(words: list[str] | tuple[str, ...]) -> Tensor:
            return torch.tensor([tokens[w + "</w>"] for w in words], device=device)

        self.word = {w: tokens[w + "</w>"] for w in WORDS}
        self.names, self.colors, self.textures = ids(CLASSES), ids([*COLORS]), ids(TEXTURES)
        self.sizes, self.turns, self.sharpness = ids(SIZES), ids(TURNS), ids(SHARPNESS)
        self.media, self.kinds = ids(MEDIA), ids(KINDS)
        self.style = ids([STYLES[s] for s in styles])
        self.weight = ids([WEIGHTS[(w >= 350) + (w >= 600)] for w in weights])
        self.slant = ids([SLANTS[not u] for u in upright])

    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Tensor:
        """Return (batch, 32) token ids: a random part of the truth, the name missing in 15 %, wrong in 10 %."""
        n, like = len(scene.face), scene.face
        truth = scene.character[:, 0]
        classes = torch.where(truth < 52, truth % 26, truth - 26)
        luck = uniform((n, 17), 0, 1, like, generator)
        wrong = torch.randint(36, (n,), generator=generator, device=like.device)
        told = torch.where(luck[:, 0] < 0.10, wrong, classes)
        slots = self._slots(scene, truth, told, luck)
        return self._packed(slots)

    def _slots(self, scene: Scene, truth: Tensor, told: Tensor, luck: Tensor) -> Tensor:
        """Return (batch, slots) ids in reading order, -1 where the caption leaves a word out."""
        word = {w: torch.full_like(scene.face, i) for w, i in self.word.items()}
        kind = torch.where(truth < 52, word["letter"], word["digit"])
        kind = torch.where(luck[:, 1] < 0.4, word["character"], kind)
        case = torch.where(truth < 52, self.kinds[(truth < 26).long()], -1)
        size = self.sizes[(scene.scale > 0.65).long() + (scene.scale > 0.85).long()]
        turn = self.turns[1 + (scene.angle < -0.1).long() - (scene.angle > 0.1).long()]
        blur = self.sharpness[(scene.blur > 0.3).long() + (scene.blur > 0.9).long()]
        near = scene.neighbours > 0
        medium = self.media[(luck[:, 2] * 3).long().clamp(max=2)]
        groups = [  # chance of being said, then the words said together
            (0.4, [medium, word["of"]]), (0.7, [word["the"]]), (0.4, [size]), (0.3, [blur]),
            (0.3, [self.weight[scene.face]]), (0.3, [self.slant[scene.face]]), (0.5, [self.colors[scene.ink]]),
            (0.5, [self.style[scene.face]]), (0.4, [case]), (0.85, [kind]), (0.85, [self.names[told]]),
            (0.3, [word["turned"], turn]),
            (0.4, [torch.where(near, word["between"], word["alone"]), torch.where(near, word["others"], -1)]),
            (0.5, [word["on"], self.colors[scene.paper], self.textures[scene.texture], word["background"]]),
        ]  # fmt: skip
        columns = [
            torch.where(luck[:, i + 3] < chance, w, -1) for i, (chance, words) in enumerate(groups) for w in words
        ]
        return torch.stack(columns, 1)

    def _packed(self, slots: Tensor) -> Tensor:
        """Return the said words moved to the front, between begin and end, padded with end."""
        order = (slots < 0).long().sort(dim=1, stable=True).indices
        said = slots.gather(1, order)
        said = torch.where(said < 0, self.end, said)
        row = torch.full((len(slots), LENGTH), self.end, device=slots.device)
        row[:, 0] = self.begin
        row[:, 1 : 1 + said.shape[1]] = said
        return row
