"""The mechanisms of the causal model: one continuous, monotone flow for each variable.

    mechanism   x_i = f_i(pa_i, u_i), u_i ~ N(0, 1): the map from t = 0 to 1 of  dx/dt = v(x, t, i, pa_i)
    abduction   u_i = f_i(pa_i, .)^-1 (x_i): the same equation, followed back
    loss        E |v(x_t, t, i, pa_i) - (x - u)|^2,  x_t = (1 - t) u + t x,  u sorted as x among rows of equal parents

In one dimension the map is monotone, so it is the optimal transport of N(0, 1) to p(x_i | pa_i), and a counterfactual
is x* = F^-1(F(x | pa) | pa*), F the distribution function of x given its parents: the rank among one's like is kept.
Sources: arXiv 2510.08294 (optimal couplings identify counterfactuals), Lipman et al. 2023 (flow matching).

Discrete factors. Each value owns an interval of the line, as wide under N(0, 1) as the value is frequent; a row that
shows the value lies somewhere in it. Its place is random, from the row's seed, away from the edges by 1e-4 of the
interval; what follows is deterministic, so the value comes back exactly. With no parents, or parents that say
nothing, v = 0. Age is cut into years in the same way, but an age keeps its place in its year: whole years stand for
the year around them. The order of the values is that of fields.py; for dataset, race and view it is a convention, and
so is their counterfactual.

Unknown values. A row trains the mechanisms of the variables that it knows, with those parents that it knows: an
unknown parent adds nothing to the network's input. In half of the rows known parents are hidden too, at random, so
that every pattern can be asked for. If values are missing at random, the mechanism that lacks a parent is then the
average over it. In a counterfactual what was unknown stays unknown, unless it is intervened on. Tables that only list
what was found are another matter: see the closed world in patients.py.

Conventions: t = 0 is noise. N rows, M variables with a mechanism in topological order, K values, S slots of what
parents show, D width, P pairs sorted for training, B of them a step.
"""
import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from causal.graph import DETERMINED, check_graph
from common.cli import InputError
from radiographs import fields

YEARS = fields.MAX_AGE + 1  # classes of age: year k is [k - 0.5, k + 0.5)
WAVES = 4                   # age as a parent: cosines of its rank, from the constant to the third
EDGE = 1e-4                 # how far a discrete value stays from the ends of its interval, as a share of it
STEPS = 16                  # Runge-Kutta steps from noise to data
POOL = 1 << 18              # rows a variable that training sorts at a time
CHUNK = 1 << 14             # rows that the solver holds at a time


def is_share(value):
    return type(value) in (int, float) and 0 <= value <= 1


@dataclass
class CausalConfig:
    graph: dict                              # variable -> its parents
    shares: dict                             # variable -> share of each value in the rows that know it; age by year
    datasets: tuple = fields.DATASETS        # values of the variable "dataset"
    closed_world: bool = False               # whether unmentioned findings were read as negative (patients.py)
    width: int = 64                          # D
    depth: int = 2                           # layers that all variables share
    source: list = field(default_factory=list)    # names of the indices that it was fitted on
    rows: int = 0                            # and their training rows

    def check(self):
        """Refuses a configuration of which no model can be built, such as one from a damaged file. Raises
        InputError."""
        for name, low, high in (("width", 1, 4096), ("depth", 0, 64), ("rows", 0, 10 ** 12)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} is {str(value)[:60]}, not a whole number from {low} to {high:,}")
        for name in ("datasets", "source"):
            values = getattr(self, name)
            if not (isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)):
                raise InputError(f"{name} is {str(values)[:60]}, not a list of names")
        names = [name for name in check_graph(self.graph) if name != DETERMINED]
        if not isinstance(self.shares, dict) or set(self.shares) != set(names):
            raise InputError("shares are not those of the graph's variables")
        for name in names:
            shares, count = self.shares[name], YEARS if name == "age" else len(self.values(name))
            if not (isinstance(shares, list) and len(shares) == count and all(map(is_share, shares)) and any(shares)):
                raise InputError(f"shares of {name}: not {count} numbers from 0 to 1, one for each value")

    def values(self, name):
        return tuple(self.datasets) if name == "dataset" else fields.VALUES[name]


class CausalModel(nn.Module):
    """All mechanisms in one network: first and last layer are a variable's own, the layers between are shared.

    A row in memory is its `places` (M,) float64: which value, and where in it. Place 1.3 of sex is "male", three tenths
    into its interval; age 57 is at 57.5 of 121 years; NaN is unknown.
    """

    def __init__(self, config):
        super().__init__()
        config.check()
        self.config, self.graph = config, check_graph(config.graph)
        self.names = [name for name in self.graph if name != DETERMINED]
        m, d, slots = len(self.names), config.width, []
        levels = torch.ones(m, 1 + max(len(config.shares[name]) for name in self.names), dtype=torch.float64)
        for i, name in enumerate(self.names):
            share = torch.tensor([0, *config.shares[name]], dtype=torch.float64)
            levels[i, :len(share)] = share.cumsum(0) / share.sum()
            slots += [i] * (WAVES if name == "age" else len(config.shares[name]))
        parent = torch.tensor([[other in self.graph[name] for other in self.names] for name in self.names])
        seen = torch.cat([torch.ones(m, 2), parent[:, slots]], 1)                # x, t, and what parents show
        self.register_buffer("levels", levels, persistent=False)                 # M K+1: where values begin and end
        self.register_buffer("parent", parent, persistent=False)                 # M M
        self.register_buffer("seen", seen[..., None], persistent=False)          # M 2+S 1
        self.first = nn.Parameter(0.4 * torch.randn(m, 2 + len(slots), d))
        self.bias = nn.Parameter(0.4 * torch.randn(m, 1, d))
        self.hidden = nn.ModuleList([nn.Linear(d, d) for _ in range(config.depth)])
        self.last = nn.Parameter(torch.zeros(m, d, 1))                           # v = 0 at the start: x = u

    def forward(self, x, t, shown, which=slice(None)):
        """Velocity of the variables `which`: x, t (M N), shown (M N S) -> (M N). Only parents are let through."""
        h = torch.cat([x[..., None], t[..., None], shown], -1)                   # M N 2+S
        h = F.silu(torch.baddbmm(self.bias[which], h, (self.first * self.seen)[which]))  # M N D
        for layer in self.hidden:
            h = h + F.silu(layer(h))                                             # M N D
        return (h @ self.last[which])[..., 0]                                    # M N

    def rank(self, place, i):
        """Marginal distribution function of variables i (indices, shaped as place) at their places."""
        k = place.long()
        low, high = self.levels[i, k], self.levels[i, k + 1]
        return low + (high - low) * (place - k)

    def score(self, place, i):
        """Place to the line on which the flow runs: N(0, 1) over all rows."""
        return torch.special.ndtri(self.rank(place, i).clamp(1e-12, 1 - 1e-12))

    def place(self, score, i):
        """The inverse of score, for one variable i."""
        q = torch.special.ndtr(score).clamp(1e-12, 1 - 1e-12)
        k = torch.searchsorted(self.levels[i], q, right=True) - 1                # a value without a share is skipped
        return k + ((q - self.levels[i, k]) / (self.levels[i, k + 1] - self.levels[i, k])).clamp(0, 1 - 1e-9)

    def show(self, places):
        """What parents show: places (... M) -> (... S), one-hot values and waves of age; zeros are unknown."""
        parts, known, places = [], ~places.isnan(), places.nan_to_num(0.5)
        for i, name in enumerate(self.names):
            if name == "age":
                part = torch.cos(math.pi * self.rank(places[..., i], i)[..., None] * torch.arange(WAVES))
            else:
                part = F.one_hot(places[..., i].long(), len(self.config.shares[name]))
            parts.append(part * known[..., i:i + 1])
        return torch.cat(parts, -1).to(self.bias.dtype)

    def transport(self, x, shown, i, times=(0, 1)):
        """Follows variable i from times[0] to times[1] by fourth-order Runge-Kutta: x (N,), shown (N S) -> (N,)."""
        out = []
        for start in range(0, len(x), CHUNK):
            y, parents = x[start:start + CHUNK], shown[None, start:start + CHUNK]
            for t, s in itertools.pairwise(torch.linspace(*times, STEPS + 1, dtype=torch.float64)):
                def velocity(y, t):
                    return self(y[None], t.expand(1, len(y)), parents, slice(i, i + 1))[0]
                h = s - t
                a = velocity(y, t)
                b = velocity(y + h / 2 * a, t + h / 2)
                c = velocity(y + h / 2 * b, t + h / 2)
                y = y + h / 6 * (a + 2 * b + 2 * c + velocity(y + h * c, s))
            out.append(y)
        return torch.cat(out) if out else x

    @torch.no_grad()
    def abduct(self, places):
        """The noise that explains places: (N M) -> (N M), NaN where unknown."""
        shown, noise = self.show(places), torch.full_like(places, torch.nan)
        for i in range(len(self.names)):
            known = ~places[:, i].isnan()
            noise[known, i] = self.transport(self.score(places[known, i], i), shown[known], i, (1, 0))
        return noise

    @torch.no_grad()
    def predict(self, noise, do={}, factual=None):
        """Places (N M) from noise (N M), parents first. do: variable -> place, set for all rows or each (N,).
        With factual places, only descendants of what is set are computed; all other columns are the factual ones."""
        places, changed = torch.full_like(noise, torch.nan), set(do)
        for i, name in enumerate(self.names):
            if name in do:
                places[:, i] = do[name]
            elif factual is not None and not changed & set(self.graph[name]):
                places[:, i] = factual[:, i]
            else:
                changed.add(name)
                known = ~noise[:, i].isnan()
                places[known, i] = self.place(self.transport(noise[known, i], self.show(places[known]), i), i)
        return places

    @torch.no_grad()
    def likelihood(self, places):
        """log p of each value, of ages by year, given the parents that are known: (N M), NaN where unknown.

        A value's probability is that of the noise which ends in its interval: its two ends, followed back."""
        shown, out = self.show(places), torch.full_like(places, torch.nan)
        for i in range(len(self.names)):
            known = ~places[:, i].isnan()
            k, chance = places[known, i].long(), []
            for end in (self.levels[i, k], self.levels[i, k + 1]):
                u = self.transport(torch.special.ndtri(end.clamp(1e-6, 1 - 1e-6)), shown[known], i, (1, 0))
                chance.append(torch.where((end > 0) & (end < 1 - 1e-12), torch.special.ndtr(u), end))
            out[known, i] = (chance[1] - chance[0]).clamp(min=1e-9).log()
        return out


# ---------------------------------------------------------------------------------------------------------
# Fitting

def coupled_noise(x, group, uniform):
    """Noise u ~ N(0, 1) for each x so that within a group u rises with x: the optimal coupling in one dimension.

    The r-th of n in its group gets a random number from the r-th of n equally likely parts of N(0, 1): in every group
    u is N(0, 1), however small n. x, group (whole numbers), uniform in (0, 1): (n,) each -> (n,)."""
    _, group, size = torch.unique(group, return_inverse=True, return_counts=True)
    order = x.argsort()
    order = order[group[order].argsort(stable=True)]                 # by group, then by x
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(x)) - (size.cumsum(0) - size)[group[order]]
    return torch.special.ndtri((rank + uniform) / size[group])


def sort_pairs(model, classes, rows, count, rng):
    """`count` pairs for each variable, sorted: u, x (M P), and the classes of what x's parents show (M P M), -1
    unknown."""
    m = len(model.names)
    pick = torch.stack([known[torch.randint(len(known), (count,), generator=rng)] for known in rows])  # M P
    seen, i = classes[pick].long(), torch.arange(m)[:, None]         # M P M
    value = seen[i, torch.arange(count), i]                          # M P, of the variable itself
    # Half of the rows show all parents that they know; the others hide each with a rate of their own.
    rate = torch.rand(m, count, 1, generator=rng) * (torch.rand(m, count, 1, generator=rng) < 0.5)
    hidden = torch.rand(m, count, m, generator=rng) < rate
    seen = torch.where(hidden | ~model.parent[:, None], -1, seen)
    x = model.score(value + EDGE + (1 - 2 * EDGE) * torch.rand(m, count, generator=rng, dtype=torch.float64), i)
    # One number for each pattern of shown values (digits in a mixed base) and variable. Ages are alike within a year.
    base = torch.tensor([1 + len(model.config.shares[name]) for name in model.names])
    group = ((seen + 1) * (base.cumprod(0) // base)).sum(-1) * m + i
    uniform = torch.rand(m * count, generator=rng, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return coupled_noise(x.flatten(), group.flatten(), uniform).view(m, count).float(), x.float(), seen.short()


def fit(classes, config, steps=8000, batch=256, seed=0, progress=False):
    """The model trained on classes (N, M), whose columns are the model's names; each step takes `batch` rows for each
    variable."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = CausalModel(config)
    rows = [(classes[:, i] >= 0).nonzero()[:, 0] for i in range(len(model.names))]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pool = POOL // batch                                             # batches from one sorting
    bar = tqdm(range(steps), unit="step", disable=not progress)
    for step in bar:
        if step % pool == 0:
            u, x, seen = sort_pairs(model, classes, rows, min(pool, steps - step) * batch, rng)
        part = slice(step % pool * batch, (step % pool + 1) * batch)
        noise, target, parents = u[:, part], x[:, part], seen[:, part]
        inside = torch.rand(parents.shape, generator=rng)            # ages are known to the year
        t = torch.rand(noise.shape, generator=rng)                   # M B
        v = model((1 - t) * noise + t * target, t, model.show(torch.where(parents < 0, torch.nan, parents + inside)))
        loss = (v - (target - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval().requires_grad_(False).double()
