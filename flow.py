"""Rectified flow: a straight path from noise to data, a velocity learnt along it, and an ODE that follows it.

    path      x_t = (1 - t) noise + t data          t = 0 is noise, t = 1 is data
    velocity  v   = dx_t / dt = data - noise
    loss      E |v_theta(x_t, t, c) - v|²
    times     t = shift(sigmoid(n)), n ~ N(0, 1): logit-normal, moved towards noise for large images
    guidance  v = v_null + w (v_cond - v_null)      w = 1 is off; on all channels; if asked, only for t in an interval
    sampling  x <- x + (t' - t) v_theta(x, t, c)    Euler's step from t to t', from t = 0 to t = 1

A network predicts the velocity itself ("velocity") or the clean data ("data"), from which v = (data - x_t) / (1 - t).
Sources: Liu et al. 2022 and Lipman et al. 2023 (the path), Esser et al. 2024 (logit-normal times, eq. 23 for the
shift), Karras et al. 2022 (Heun), Ho and Salimans 2022 (guidance), Kynkäänniemi et al. 2024 (only in an interval), Li
and He 2025 (data prediction, velocity loss).
Shapes: N images, C channels, H x W pixels or latent cells. A module without a command: train.py and sample.py use it.
"""
import torch

PREDICTIONS = ("velocity", "data")
SOLVERS = {"euler": 1, "heun": 2}  # evaluations of the velocity in a step


def shift_time(t, shift):
    """The one time shift, for training and sampling: the share of noise, u = 1 - t, becomes
    shift u / (1 + (shift - 1) u). Above 1 it moves times towards noise; 1 changes nothing."""
    return t / (t + shift * (1 - t))


def sample_times(count, shift, generator):
    """Training times, (count,), logit-normal and shifted. They are stratified: the distribution is cut into `count`
    parts of equal probability and one time is taken from each, so that every batch covers all times and its loss
    varies less."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    quantile = (torch.arange(count, device=uniform.device) + uniform) / count
    return shift_time(torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6)).sigmoid(), shift)


def time_grid(steps, shift):
    """Sampling times from 0 to 1, (steps + 1,) float64, shifted. Flip it to go from data to noise."""
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)


def to_velocity(output, x, t, prediction):
    """A network's output, velocity or data (`prediction`), as velocity (N C H W), at x (N C H W) and t (N,)."""
    if prediction == "velocity":
        return output
    # Near t = 1 the division would amplify the network's error without bound. So from t = 0.95 on the divisor stays
    # 0.05, in the loss's target too (Li and He 2025); sampling then ends a little short of the predicted data.
    return (output - x) / (1 - t).clamp(min=0.05).view(-1, 1, 1, 1)


def flow_loss(predict, data, noise, t, prediction="velocity"):
    """Squared velocity error of each image, (N,), and the clean data that the network predicts, (N C H W).
    predict(x, t) is the network; data, noise (N C H W); t (N,)."""
    share = t.view(-1, 1, 1, 1)                                      # N 1 1 1, the share of data in x_t
    x = (1 - share) * noise + share * data                           # N C H W
    output = predict(x, t).float()                                   # N C H W
    v = to_velocity(output, x, t, prediction)                        # N C H W
    target = data - noise if prediction == "velocity" else to_velocity(data, x, t, prediction)  # N C H W
    predicted = x + (1 - share) * v if prediction == "velocity" else output  # N C H W
    return (v - target).square().mean((1, 2, 3)), predicted


def guidance_active(t, weight, interval):
    """Whether a velocity at time t needs the null branch too."""
    return weight != 1 and interval[0] <= float(t) <= interval[1]


def classifier_free_guidance(predict, condition, null, weight, prediction="velocity", interval=(0, 1)):
    """velocity(x, t) under guidance. predict(x, t, *condition) is the network; `condition` and `null` are tuples of
    tensors (N, ...). Both branches run in one batch of 2N. With weight 1, or for t outside the interval, whose ends
    belong to it, the null branch does not run at all."""
    both = [torch.cat(pair) for pair in zip(condition, null)]        # 2N ...

    def velocity(x, t):                                              # N C H W, float
        active = guidance_active(t, weight, interval)
        t = torch.full((len(x),), float(t), device=x.device)         # N
        if not active:
            return to_velocity(predict(x, t, *condition).float(), x, t, prediction)
        output = predict(torch.cat([x, x]), torch.cat([t, t]), *both).float()  # 2N C H W
        v_cond, v_null = (to_velocity(half, x, t, prediction) for half in output.chunk(2))  # N C H W each
        return v_null + weight * (v_cond - v_null)                   # N C H W

    return velocity


def count_network_calls(times, solver, weight, interval=(0, 1)):
    """How many times the network runs for one image: once for each velocity, or twice where guidance is active."""
    calls = 0
    for start, end in zip(times[:-1], times[1:]):
        for t in (start, end)[:SOLVERS[solver]]:                     # the times at which a step asks for a velocity
            calls += 2 if guidance_active(t, weight, interval) else 1
    return calls


def integrate(velocity, x, times, solver="euler", report=None):
    """Follows dx/dt = velocity(x, t) through `times`: from noise to data for rising times, back for falling ones.

    Returns x at times[-1] and the number of velocity evaluations: one for each step of "euler" (first order), two for
    each step of "heun" (second order). Where guidance is active, one evaluation runs the network on both branches.
    `report()` is called after every evaluation.
    """
    evaluations = 0

    def evaluate(x, t):
        nonlocal evaluations
        evaluations += 1
        v = velocity(x, t)
        if report:
            report()
        return v

    for start, end in zip(times[:-1], times[1:]):
        h = float(end - start)
        v = evaluate(x, start)
        if solver == "heun":
            v = (v + evaluate(x + h * v, end)) / 2
        x = x + h * v
    return x, evaluations
