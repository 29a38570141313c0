"""Reinforcement learning as a task: proximal policy optimization of a point that is to be brought
to rest at the origin."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.tasks.problems import Task

POINTS, LENGTH, MINIBATCH, TIMES = 64, 50, 800, 4
ITERATIONS = 25
DISCOUNT, TRACE = 0.98, 0.95
VALUES = 10.0  # what the value network's outputs are in units of


def _network(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )


class PointMass(Task):
    """States are place and speed in the plane, actions pushes; the cost is the squared distance."""

    title = "policy gradients (PPO), point mass"
    steps = ITERATIONS * TIMES * (POINTS * LENGTH // MINIBATCH)
    measure = "cost of an episode; mean of the last three for train, at the end for test"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.model = nn.ModuleDict({"policy": _network(2), "value": _network(1)})
        self.spread = nn.Parameter(torch.full((2,), -0.5))  # logarithm of the actions' deviation
        self.model.register_parameter("spread", self.spread)
        self.costs: list[float] = []

    @torch.no_grad()
    def play(self, draw: torch.Generator, explore: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, actions, their log-likelihoods and rewards: LENGTH x POINTS (x 4 or 2)."""
        place = 2 * (2 * torch.rand(POINTS, 2, generator=draw) - 1)
        state = torch.cat([place, torch.zeros(POINTS, 2)], 1)
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(LENGTH):
            action = self.model["policy"](state)
            if explore:
                noise = torch.randn(action.shape, generator=draw)
                action = action + self.spread.exp() * noise
            push = action.clamp(-1, 1)
            speed = 0.95 * state[:, 2:] + 0.15 * push
            place = state[:, :2] + 0.2 * speed
            reward = -place.square().sum(1) - 0.01 * push.square().sum(1)
            kept.append((state, action, self.likelihood(state, action), reward))
            state = torch.cat([place, speed], 1)
        states, actions, likelihoods, rewards = map(torch.stack, zip(*kept, strict=True))
        return states, actions, likelihoods, rewards

    def likelihood(self, state: Tensor, action: Tensor) -> Tensor:
        """Logarithm, without its constant."""
        off = (action - self.model["policy"](state)) / self.spread.exp()
        return (-0.5 * off.square() - self.spread).sum(-1)

    def batches(self) -> Iterator[Callable[[], Tensor]]:
        while True:
            states, actions, before, rewards = self.play(self.draw, explore=True)
            with torch.no_grad():
                values = VALUES * self.model["value"](states).squeeze(-1)
            gains = torch.zeros_like(rewards)
            following, last = values[-1], torch.zeros(POINTS)
            for t in reversed(range(LENGTH)):
                surprise = rewards[t] + DISCOUNT * following - values[t]
                last = gains[t] = surprise + DISCOUNT * TRACE * last
                following = values[t]
            rows = [x.flatten(0, 1) for x in (states, actions, before, gains, gains + values)]
            for _ in range(TIMES):
                order = torch.randperm(len(rows[0]), generator=self.draw)
                for part in order.split(MINIBATCH):
                    batch = [x[part] for x in rows]
                    yield lambda b=batch: self.loss(*b)
            self.costs.append(self.cost(99))

    def loss(
        self, state: Tensor, action: Tensor, before: Tensor, gain: Tensor, target: Tensor
    ) -> Tensor:
        """The clipped objective, and the squared error of the values."""
        gain = (gain - gain.mean()) / (gain.std() + 1e-6)
        ratio = (self.likelihood(state, action) - before).exp()
        clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        value = self.model["value"](state).squeeze(-1)
        return -clipped.mean() + 0.5 * (value - target / VALUES).square().mean()

    def cost(self, seed: int) -> float:
        """Of an episode without noise, mean over the points."""
        rewards = self.play(torch.Generator().manual_seed(seed), explore=False)[3]
        return -float(rewards.sum(0).mean())

    def reached(self) -> tuple[float, float]:
        recent = [*self.costs, self.cost(99)][-3:]
        return sum(recent) / len(recent), self.cost(98)
