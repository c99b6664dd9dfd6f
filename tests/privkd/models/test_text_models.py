"""Models of token ids: padding is nothing, every layer is proved, and both engines give the same weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from privkd.config import DpSgdConfig, ModelConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import ModelError
from privkd.models.text import Attention
from privkd.models.zoo import build
from privkd.privacy.randomness import SeededRandomness
from privkd.training.dpsgd import Mechanism, Part, check_trainable, fastest_mode, train_private
from privkd.training.proof import Probe
from privkd.training.vectorised import train_cohort
from privkd.training.vectorised.cohort import formulation
from privkd.training.vectorised.gradients import BookKeeping, candidates
from privkd.training.vectorised.tensors import Batch, Objective

NAMES = ("text-embedding", "text-cnn", "transformer")
VOCABULARY, LENGTH, CLASSES = 40, 9, 3


def model(name: str, seed: int = 0) -> nn.Module:
    return build(
        ModelConfig(name=name, width=8),
        input_shape=(LENGTH,),
        classes=CLASSES,
        seed=seed,
        vocabulary=VOCABULARY,
    )


def records(count: int, seed: int = 0) -> LabelledSet:
    """Texts of every length, none at all among them; words occur twice in one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    ids[:, 1] = ids[:, 0]
    lengths = torch.arange(count) % (LENGTH + 1)
    ids[torch.arange(LENGTH) >= lengths[:, None]] = 0
    return LabelledSet(ids, torch.arange(count) % CLASSES)


def mechanism(part: Part = "all", **changes: float) -> Mechanism:
    recipe = DpSgdConfig(part=part, steps=3, sampling_rate=0.7, learning_rate=0.5, clip_norm=0.3)
    return Mechanism(recipe, 0.5, 20.0, 0.5, 2.0, Probe.of(records(30).inputs, CLASSES))


def flat(trained: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


@pytest.mark.parametrize("name", NAMES)
class TestEach:
    @torch.no_grad()
    def test_padding_contributes_nothing(self, name: str) -> None:
        """As many zeros more, and another embedding of the padding: the same answers."""
        student, ids = model(name).double().eval(), records(10).inputs
        longer = torch.cat([ids, ids.new_zeros((len(ids), 5))], dim=1)
        other = copy.deepcopy(student)
        for module in other.modules():
            if isinstance(module, nn.Embedding):
                module.weight[0] = 1e3
        assert torch.allclose(student(ids), student(longer), atol=1e-12)
        assert torch.allclose(student(ids), other(ids), atol=1e-12)
        assert bool(student(ids).isfinite().all()), "nothing at all is a text too"

    def test_words_and_their_order(self, name: str) -> None:
        student = model(name).eval()
        ids = torch.tensor([[3, 4, 5, 6, 0, 0, 0, 0, 0], [6, 5, 4, 3, 0, 0, 0, 0, 0]])
        first, second = student(ids)
        assert torch.allclose(first, second, atol=1e-5) == (name == "text-embedding")

    @pytest.mark.parametrize("part", ["all", "head"])
    def test_it_is_proved_and_fast(self, name: str, part: Part) -> None:
        student, given = model(name), mechanism(part)
        check_trainable(
            student, input_shape=(LENGTH,), classes=CLASSES, recipe=given.recipe, probe=given.probe
        )
        assert fastest_mode(student, records(2).inputs, given) != "autograd"
        assert formulation(student, (LENGTH,), torch.int64) == "bookkeeping"

    @pytest.mark.parametrize("part", ["all", "last_block", "head"])
    def test_both_engines_give_the_same_weights(self, name: str, part: Part) -> None:
        students = [model(name, seed) for seed in range(3)]
        shards = [records(count, count) for count in (20, 7, 0)]
        given = mechanism(part)
        logits = [torch.zeros(len(shard), CLASSES) for shard in shards]
        sources = [SeededRandomness(0, f"device {number}") for number in range(3)]
        together = train_cohort(students, shards, logits, given, sources)
        for number, found in enumerate(together):
            alone = train_private(
                students[number], shards[number], logits[number], given,
                SeededRandomness(0, f"device {number}"),
            )  # fmt: skip
            assert torch.allclose(flat(found), flat(alone), atol=1e-5)

    def test_a_record_moves_the_sum_by_no_more_than_the_clip_norm(self, name: str) -> None:
        """A record's own sum, for which no gradient of the table is formed, is as long as autograd says."""
        student, clip = model(name), 0.05
        batch = records(8)
        book = next(found for found in candidates(copy.deepcopy(student)) if isinstance(found, BookKeeping))
        state = {key: value.detach()[None] for key, value in student.named_parameters()}
        objective = Objective(0.0, 1.0)
        targets = objective.targets(batch.labels, None, CLASSES, torch.float32)[None]
        for row in range(len(batch)):
            weights = torch.zeros(1, len(batch))
            weights[0, row] = 1.0
            sums = book.gradients(state, {}, Batch(batch.inputs[None], targets, weights), objective, clip)
            length = torch.cat([part.flatten() for part in sums.values()]).norm()
            loss = nn.functional.cross_entropy(
                student(batch.inputs[row : row + 1]), batch.labels[row : row + 1]
            )
            own = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))]
            ).norm()
            assert float(length) == pytest.approx(min(clip, float(own)), rel=1e-3)


class OverBatch(nn.Module):
    """A broken twin: attention from each record to the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.mixed = nn.Linear(8, 24)
        self.attention = Attention(2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """``[record, length]`` to logits."""
        x = self.mixed(self.table(ids)).transpose(0, 1)
        attended: Tensor = self.head(self.attention(x, ids.t()).transpose(0, 1).mean(1))
        return attended


class TestRefused:
    def test_attention_over_the_batch(self) -> None:
        given = mechanism()
        with pytest.raises(ModelError, match="depends on the other records of the batch"):
            check_trainable(
                OverBatch(), input_shape=(LENGTH,), classes=CLASSES, recipe=given.recipe, probe=given.probe
            )

    def test_numbers_for_ids_and_ids_for_numbers(self) -> None:
        with pytest.raises(ModelError, match=r"'mlp' takes numbers.*text-embedding"):
            model("mlp")
        with pytest.raises(ModelError, match=r"'transformer' takes token ids.*mlp"):
            build(ModelConfig(name="transformer"), input_shape=(4,), classes=2, seed=0)

    def test_auto_is_the_mean_of_embeddings(self) -> None:
        assert torch.equal(flat(model("auto")), flat(model("text-embedding")))


def test_a_probe_of_ids_stays_one() -> None:
    """2**24 + 1 is no float32."""
    ids = records(30).inputs + 2**24 + 1
    ids[0] = 0
    probe = Probe.of(ids, CLASSES)
    assert probe.inputs.dtype == torch.int64
    assert {*probe.inputs.flatten().tolist()} - {0} <= {*range(2**24 + 1, 2**24 + 2 + VOCABULARY)}
    assert bool((probe.inputs == 2**24 + 1).any())
    assert bool((probe.inputs == 0).all(1).any()), "a record of padding alone is among the extremes"
