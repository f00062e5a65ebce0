"""The flow against Gaussian data, where velocity, loss floor and flow map are known in closed form.

For data ~ N(m, s²) and noise ~ N(0, 1): x_t ~ N(t m, t² s² + (1-t)²), and data - noise given x_t is Gaussian with
    mean      m + (t s² - (1-t)) / (t² s² + (1-t)²) (x_t - t m)         the exact velocity
    variance  s² / (t² s² + (1-t)²)                                     the loss floor
The ODE maps noise x to m + s x.
"""
import pytest
import torch

import flow

M, S = 0.7, 0.3


def exact_velocity(x, t):
    t = torch.as_tensor(t, dtype=x.dtype)
    t = t.view(-1, 1, 1, 1) if t.ndim else t
    return M + (t * S ** 2 - (1 - t)) / (t ** 2 * S ** 2 + (1 - t) ** 2) * (x - t * M)


def gaussian(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    noise, data = torch.randn(2, count, 1, 2, 2, generator=rng, dtype=torch.float64)
    return noise, M + S * data, rng


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_loss_of_the_exact_velocity_is_the_floor(t, prediction):
    noise, data, _ = gaussian(200_000)
    times = torch.full((len(data),), t, dtype=torch.float64)

    def predict(x, t):
        v = exact_velocity(x, t)
        return v if prediction == "velocity" else x + (1 - t).view(-1, 1, 1, 1) * v

    floor = S ** 2 / (t ** 2 * S ** 2 + (1 - t) ** 2)
    losses, predicted = flow.flow_loss(predict, data, noise, times, prediction)
    assert losses.shape == (200_000,)
    assert losses.mean().item() == pytest.approx(floor, rel=0.01)
    x = (1 - t) * noise + t * data
    expected = M + S ** 2 * t / (t ** 2 * S ** 2 + (1 - t) ** 2) * (x - t * M)   # the mean of the data given x
    torch.testing.assert_close(predicted.double(), expected, rtol=1e-4, atol=1e-4)
    # An error of 0.1 in the output adds its square to the floor; in the data it weighs 1 / (1 - t)² more.
    worse, _ = flow.flow_loss(lambda x, t: predict(x, t) + 0.1, data, noise, times, prediction)
    added = 0.01 / (1 if prediction == "velocity" else (1 - t) ** 2)
    assert (worse - losses).mean().item() == pytest.approx(added, rel=0.05)


@pytest.mark.parametrize("solver, order, evaluations", [("euler", 1, 1), ("heun", 2, 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampler_converges_at_its_order(solver, order, evaluations, shift):
    noise, _, _ = gaussian(1000)
    truth, errors = M + S * noise, []
    for steps in (100, 200, 400):
        x, count = flow.integrate(exact_velocity, noise, flow.time_grid(steps, shift), solver)
        assert count == evaluations * steps
        errors.append((x - truth).abs().max().item())
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert ratios == pytest.approx([2 ** order] * 2, rel=0.2)


@pytest.mark.parametrize("solver, tolerance", [("euler", 0.1), ("heun", 1e-3)])
def test_inversion_returns_the_noise(solver, tolerance):
    noise, _, _ = gaussian(1000)
    times = flow.time_grid(100, 1.0)
    data = M + S * noise
    back, _ = flow.integrate(exact_velocity, data, times.flip(0), solver)
    assert (back - noise).abs().max() < tolerance
    again, _ = flow.integrate(exact_velocity, back, times, solver)
    assert (again - data).abs().max() < tolerance


def test_shift_moves_times_towards_noise():
    # Esser et al. 2024, eq. 23, in its own direction (1 is noise): s = 3 takes 1/2 to 3/4 and 1/4 to 1/2.
    t = torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert flow.shift_time(t, 3.0).tolist() == pytest.approx([0, 0.25, 0.5, 1])
    assert flow.shift_time(t, 1.0).tolist() == t.tolist()
    assert flow.time_grid(4, 3.0).tolist() == pytest.approx([0, 0.1, 0.25, 0.5, 1])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_have_the_logit_normal_quantiles(shift):
    t = flow.sample_times(100_000, shift, torch.Generator().manual_seed(0)).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    for q in (0.05, 0.5, 0.95):
        u = 1 / (1 + torch.exp(-normal.icdf(torch.tensor(q, dtype=torch.float64))))  # sigmoid of the normal quantile
        noise = 1 - u
        expected = 1 - shift * noise / (1 + (shift - 1) * noise)
        assert t.quantile(q).item() == pytest.approx(expected.item(), abs=0.01)


def test_every_batch_covers_all_times():
    t = flow.sample_times(8, 1.0, torch.Generator().manual_seed(0)).double()
    octiles = 8 * torch.distributions.Normal(0.0, 1.0).cdf(torch.logit(t))
    assert octiles.long().tolist() == list(range(8))
    assert t.tolist() != flow.sample_times(8, 1.0, torch.Generator().manual_seed(1)).tolist()


def test_guidance_acts_on_all_channels_and_1_is_off():
    condition, null = [torch.full((2, 1), 3.0)], [torch.full((2, 1), 1.0)]
    calls = []

    def predict(x, t, c):
        calls.append(len(x))
        return x * 0 + c[:, :, None, None]                           # v = c on every channel

    x = torch.zeros(2, 5, 3, 3)
    assert torch.equal(flow.classifier_free_guidance(predict, condition, null, 1.0)(x, 0.5), torch.full_like(x, 3.0))
    v = flow.classifier_free_guidance(predict, condition, null, 2.0)(x, 0.5)
    assert torch.equal(v, torch.full_like(x, 5.0))                   # 1 + 2 (3 - 1)
    assert torch.equal(flow.classifier_free_guidance(predict, condition, null, 0.0)(x, 0.5), torch.full_like(x, 1.0))
    assert calls == [2, 4, 4]                                        # one batch for both branches; no null at 1


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("weight, interval", [(2.0, (0.25, 0.5)), (2.0, (0, 1)), (1.0, (0, 1)), (3.0, (0.9, 0.95)),
                                              (0.5, (0.5, 0.5))])
def test_guidance_in_an_interval_of_time(solver, weight, interval):
    """On data whose velocity is exact: guidance adds (w - 1) (v_cond - v_null) inside, nothing outside, and
    count_network_calls says how often the network really ran. v_null is lower than v_cond by 1 at all times."""
    noise, _, _ = gaussian(50)
    noise, times, ran = noise.float(), flow.time_grid(8, 1.0), []
    condition, null = [torch.zeros(50, 1)], [torch.ones(50, 1)]

    def predict(x, t, c):
        ran.append(len(x))
        return exact_velocity(x, t) - c[:, :, None, None]

    velocity = flow.classifier_free_guidance(predict, condition, null, weight, interval=interval)
    plain = flow.classifier_free_guidance(predict, condition, null, 1.0)
    for t in times:
        added = weight - 1 if interval[0] <= t <= interval[1] else 0
        assert torch.allclose(velocity(noise, t), plain(noise, t) + added, atol=1e-5)
        if not added:
            assert torch.equal(velocity(noise, t), plain(noise, t))
    ran.clear()
    x, evaluations = flow.integrate(velocity, noise, times, solver)
    assert sum(ran) / 50 == flow.count_network_calls(times, solver, weight, interval)
    assert evaluations == len(ran) == 8 * (2 if solver == "heun" else 1)
    if interval == (0.9, 0.95):                                      # between two steps: guidance is never active
        assert torch.equal(x, flow.integrate(plain, noise, times, solver)[0])


def test_network_calls_by_hand():
    times = flow.time_grid(4, 1.0)                                   # 0, 1/4, 1/2, 3/4, 1
    assert flow.count_network_calls(times, "euler", 1.0) == 4 and flow.count_network_calls(times, "euler", 2.0) == 8
    assert flow.count_network_calls(times, "euler", 2.0, (0.25, 0.5)) == 6        # two of four with both branches
    # Heun asks at 0 1/4, 1/4 1/2, 1/2 3/4, 3/4 1: guidance is active in four of the eight.
    assert flow.count_network_calls(times, "heun", 2.0, (0.25, 0.5)) == 12
    assert flow.count_network_calls(times, "heun", 2.0, (0.8, 1)) == 9            # at the end of the last step alone


def test_data_prediction_gives_the_same_samples_as_velocity():
    noise, _, _ = gaussian(100)

    def data_from(x, t):
        return x + (1 - t).view(-1, 1, 1, 1) * exact_velocity(x, t)

    times = torch.linspace(0, 0.9, 20, dtype=torch.float64)          # up to where the division is not limited
    a, _ = flow.integrate(exact_velocity, noise, times)
    b, _ = flow.integrate(flow.classifier_free_guidance(data_from, [], [], 1.0, "data"), noise.float(), times)
    assert torch.allclose(a.float(), b, atol=1e-5)
