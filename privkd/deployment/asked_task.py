"""A question's tensors as the task that they ask for, checked against what the owner agreed to.

``queries`` int64 ``[query]`` are rows of the plan's proxy set, ascending; ``prior`` float32
``[query, class]`` the published teacher's probabilities on them; ``start.NAME`` the weights of a student of
the device's architecture, and ``teacher.NAME`` those of the teacher, where students learn from it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from privkd.deployment.agreement import Agreement
from privkd.errors import ChannelError
from privkd.messages import Question, Task

_SUM = 1e-3
"""By how much a row of probabilities may miss a sum of 1."""


def asked_task(agreement: Agreement, round: int, tensors: Mapping[str, Tensor]) -> Task:
    """The task of a ``round`` of the agreed run.

    Its mechanism, and all else that a question need not bring, is the agreement's. Where the device goes on
    with its own student and the question brings no other, ``starts`` is empty.

    Raises:
        ChannelError: the queries are no such rows, the prior is none, or weights are missing, superfluous, of
            another architecture or not finite.
        ModelError: a model mixes records at these weights.
    """
    training = agreement.published.config.student
    question = _question(agreement, round, tensors)
    groups = {name.partition(".")[0] for name in tensors if "." in name}
    must_start = round == 0 or training.start == "teacher"
    expected = {"teacher"} if training.alpha else set[str]()
    if groups - {"start"} != expected or (must_start and "start" not in groups):
        raise ChannelError(f"weights of {sorted(groups)}: not those that the plan needs")
    starts = (loaded(agreement.student(), tensors, "start"),) if "start" in groups else ()
    # No student learns from a teacher that is not sent.
    teacher = loaded(agreement.teacher(), tensors, "teacher") if training.alpha else nn.Identity()
    task = Task(teacher, starts, training, agreement.mechanism, question)
    _check_apart(agreement, task)
    return task


def _question(agreement: Agreement, round: int, tensors: Mapping[str, Tensor]) -> Question:
    plan = agreement.plan
    if strange := {name for name in tensors if "." not in name} ^ {"queries", "prior"}:
        raise ChannelError(f"tensors {sorted(strange)}: missing or superfluous")
    queries, prior = tensors["queries"], tensors["prior"]
    if queries.dtype != torch.int64 or tuple(queries.shape) != (plan.queries,):
        raise ChannelError(f"queries of shape {list(queries.shape)}: expected {plan.queries} whole numbers")
    ascending = bool((queries[1:] > queries[:-1]).all())
    if not ascending or int(queries[0]) < 0 or int(queries[-1]) >= len(agreement.proxy):
        raise ChannelError("queries that are no ascending rows of the proxy set")
    shape = (plan.queries, len(agreement.published.classes))
    if prior.dtype != torch.float32 or tuple(prior.shape) != shape or not _are_probabilities(prior):
        raise ChannelError("a prior that is no row of probabilities for each query")
    kind = agreement.published.config.channel.sends
    return Question(round, queries, agreement.proxy[queries], prior, kind)


def _are_probabilities(rows: Tensor) -> bool:
    finite = bool(rows.isfinite().all()) and bool((rows >= 0).all())
    return finite and bool(((rows.sum(-1) - 1).abs() <= _SUM).all())


def loaded(model: nn.Module, tensors: Mapping[str, Tensor], group: str) -> nn.Module:
    """``model`` with the weights of ``group``, in evaluation mode.

    Raises:
        ChannelError: weights are missing, superfluous, of another architecture or not finite.
    """
    prefix = f"{group}."
    given = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    own = model.state_dict()
    if given.keys() != own.keys():
        raise ChannelError(f"{group}: weights {sorted(given.keys() ^ own.keys())} are missing or superfluous")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise ChannelError(f"{group}.{name}: {tensor.dtype} {list(tensor.shape)} is not the plan's model")
        if not bool(tensor.isfinite().all()):
            raise ChannelError(f"{group}.{name}: a weight is not finite")
    model.load_state_dict(given)
    return model.eval()


def _check_apart(agreement: Agreement, task: Task) -> None:
    if task.mechanism is None:
        return
    from privkd.training.dpsgd import check_records_apart
    from privkd.training.proof import check_apart

    if task.training.alpha:
        check_apart(task.teacher, agreement.probe, "teacher")
    for student in task.starts:
        check_records_apart(student, task.training.dp.part, agreement.probe)
