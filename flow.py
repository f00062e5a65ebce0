"""Rectified flow: a straight path from noise to data, a velocity learnt along it, and an ODE followed back.

    path      x_t = (1 - t) noise + t data          t = 0 is noise, t = 1 is data
    velocity  v   = dx_t / dt = data - noise
    loss      E |v_theta(x_t, t, c) - v|²
    times     t = shift(sigmoid(n)), n ~ N(0, 1): logit-normal, moved towards noise for large images
    guidance  v = v_null + w (v_cond - v_null)      w = 1 is off; on all channels; only for t in an interval, if one is given

A network predicts the velocity itself ("velocity") or the clean data ("data"), from which v = (data - x_t) / (1 - t).
Sources: Liu et al. 2022 and Lipman et al. 2023 (the path), Esser et al. 2024 (logit-normal times, eq. 23 for the
shift), Karras et al. 2022 (Heun), Ho and Salimans 2022 (guidance), Kynkäänniemi et al. 2024 (only in an interval), Li and He
2025 (data prediction, velocity loss).
"""
import torch


def shift_time(t, shift):
    """The one time shift, for training and sampling: the noise share 1 - t becomes s(1-t) / (1 + (s-1)(1-t))."""
    return t / (t + shift * (1 - t))


def sample_times(count, shift, generator):
    """Training times, (count,), logit-normal and shifted; one from each count-th of the distribution, so that every
    batch covers all times and its loss varies less."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    quantile = (torch.arange(count, device=uniform.device) + uniform) / count
    return shift_time(torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6)).sigmoid(), shift)


def time_grid(steps, shift):
    """Sampling times from 0 to 1, (steps + 1,) float64, shifted. Flip it to go from data to noise."""
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)


def to_velocity(output, x, t, prediction):
    """The velocity (N C H W) that a network's output stands for, at x (N C H W) and t (N,)."""
    if prediction == "velocity":
        return output
    # Near t = 1 the division would amplify the network's error without bound: from t = 0.95 on it stays at 1 / 0.05, in
    # the loss's target too (Li and He 2025). The last steps then stop a little short of the predicted data.
    return (output - x) / (1 - t).clamp(min=0.05).view(-1, 1, 1, 1)


def flow_loss(predict, data, noise, t, prediction="velocity"):
    """Squared velocity error of each image, (N,). predict(x, t) is the network; data, noise (N C H W); t (N,)."""
    s = t.view(-1, 1, 1, 1)
    x = (1 - s) * noise + s * data                                   # N C H W
    v = to_velocity(predict(x, t).float(), x, t, prediction)         # N C H W
    target = data - noise if prediction == "velocity" else to_velocity(data, x, t, prediction)
    return (v - target).square().mean((1, 2, 3))


def guidance_active(t, weight, interval):
    """Whether a velocity at time t needs the null branch too."""
    return weight != 1 and interval[0] <= float(t) <= interval[1]


def classifier_free_guidance(predict, condition, null, weight, prediction="velocity", interval=(0, 1)):
    """velocity(x, t) under guidance. predict(x, t, *condition) is the network; `condition` and `null` are tuples of
    tensors (N, ...). Both branches run in one batch of 2N; with weight 1, or for t outside the interval (both ends belong
    to it), the null branch is not run at all."""
    both = [torch.cat(pair) for pair in zip(condition, null)]

    def velocity(x, t):                                              # N C H W, float
        acts = guidance_active(t, weight, interval)
        t = torch.full((len(x),), float(t), device=x.device)
        if not acts:
            return to_velocity(predict(x, t, *condition).float(), x, t, prediction)
        output = predict(torch.cat([x, x]), torch.cat([t, t]), *both).float()
        v_cond, v_null = (to_velocity(half, x, t, prediction) for half in output.chunk(2))
        return v_null + weight * (v_cond - v_null)

    return velocity


def count_network_calls(times, solver, weight, interval=(0, 1)):
    """How many times the network runs for one image: once for a velocity, twice for a guided one."""
    visited = [t for step in zip(times[:-1], times[1:]) for t in (step if solver == "heun" else step[:1])]
    return sum(1 + guidance_active(t, weight, interval) for t in visited)


def integrate(velocity, x, times, solver="heun", report=None):
    """Follows dx/dt = velocity(x, t) through `times`: noise to data for rising times, inversion for falling ones.

    Returns x at times[-1] and the number of velocity evaluations: one a step for "euler" (first order), two for
    "heun" (second order); a guided evaluation runs the network on both branches. `report()` is called after every evaluation.
    """
    evaluations = 0

    def evaluate(x, t):
        nonlocal evaluations
        evaluations += 1
        v = velocity(x, t)
        if report:
            report()
        return v

    for t, s in zip(times[:-1], times[1:]):
        h = float(s - t)
        v = evaluate(x, t)
        if solver == "heun":
            v = (v + evaluate(x + h * v, s)) / 2
        x = x + h * v
    return x, evaluations
