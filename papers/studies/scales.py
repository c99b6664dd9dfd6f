"""The data and sizes that studies share."""

from papers.measurements import Effort
from papers.study import Scale

DIGITS = Scale(
    "digits",
    "the embedded digits, 160 public labels with half of the classes rare, 5 devices of 140 records",
    (),
)
MNIST = Scale(
    "mnist",
    "MNIST, 2,000 public labels with half of the classes rare, 5 devices of 1,000 records",
    ("data.source=mnist", "data.devices=5", "reverse.fit.steps=100"),
)
CIFAR10 = Scale(
    "cifar10",
    "CIFAR-10, 5,000 public labels with half of the classes rare, 5 devices of 1,000 records, small CNNs",
    (
        "data.source=cifar10",
        "data.devices=5",
        "teacher.model={name='cnn', width=64, activation='relu'}",
        "teacher.fit.steps=600",
        "student.models=[{name='cnn', width=16}]",
        "student.public_fit={steps=1000, learning_rate=2e-3}",
        "student.private_fit.steps=200",
        "student.delivery_fit.steps=1000",
        "reverse.fit.steps=100",
    ),
)
QUICK = Scale(
    "quick",
    "the embedded digits as at scale digits, small models and few steps, plain channel",
    (
        "channel.kind=plain",
        "teacher.model={name='mlp', width=64}",
        "student.models=[{name='mlp', width=32}]",
        "student.public_fit.steps=150",
        "student.private_fit.steps=100",
        "reverse.fit.steps=60",
    ),
    seeds=2,
    effort=Effort(shadows=8, targets=4, trials=10),
)
