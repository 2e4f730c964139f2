//! A mixture of Gaussians on a line, fitted by expectation-maximisation (Dempster, Laird and
//! Rubin 1977) to weighted points.

use serde::Serialize;

use crate::rng::{Purpose, Stream};

/// The number of components that the Resa paper fits.
pub const COMPONENTS: usize = 3;

/// The least variance of a component: that of a uniform distribution over one layer, below which
/// the spread of whole numbers says nothing.
pub const LEAST_VARIANCE: f64 = 1.0 / 12.0;

/// Starts from different points; the best fit is kept.
const STARTS: u32 = 20;
const MOST_ITERATIONS: usize = 2000;
const TOLERANCE: f64 = 1e-10;

/// One Gaussian of a mixture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Component {
    /// Share of all points.
    pub weight: f64,
    /// Its centre.
    pub mean: f64,
    /// Its standard deviation.
    pub sd: f64,
}

/// A fitted mixture, its components in ascending order of their means.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mixture {
    /// The Gaussians.
    pub components: Vec<Component>,
    /// Σ w log p(x) over the points, in nats.
    pub log_likelihood: f64,
}

impl Component {
    fn log_density(&self, x: f64) -> f64 {
        let z = (x - self.mean) / self.sd;
        self.weight.ln() - self.sd.ln() - 0.5 * (std::f64::consts::TAU.ln() + z * z)
    }
}

impl Mixture {
    /// Fits [`COMPONENTS`] Gaussians to points (x, weight); `None` where fewer points than that
    /// have a positive weight. The same seed gives the same fit.
    pub fn fit(points: &[(f64, f64)], seed: u64) -> Option<Self> {
        let points: Vec<_> = points.iter().copied().filter(|&(_, w)| w > 0.0).collect();
        if points.len() < COMPONENTS {
            return None;
        }
        let starts = (0..STARTS).map(|start| Self::fit_from(&points, seed, start));
        let mut best = starts.max_by(|a, b| a.log_likelihood.total_cmp(&b.log_likelihood))?;
        best.components.sort_by(|a, b| a.mean.total_cmp(&b.mean));
        Some(best)
    }

    /// The density at `x`.
    pub fn density(&self, x: f64) -> f64 {
        self.components.iter().map(|c| c.log_density(x).exp()).sum()
    }

    fn fit_from(points: &[(f64, f64)], seed: u64, start: u32) -> Self {
        let mut mixture = Self::start(points, seed, start);
        let mut responsibilities = vec![[0.0; COMPONENTS]; points.len()];
        for _ in 0..MOST_ITERATIONS {
            let before = mixture.log_likelihood;
            mixture.log_likelihood = mixture.expect(points, &mut responsibilities);
            if mixture.log_likelihood - before <= TOLERANCE * mixture.log_likelihood.abs() {
                break;
            }
            mixture.maximise(points, &responsibilities);
        }
        mixture
    }

    /// Means at three different points, drawn by their weight and their distance from the means
    /// already drawn (k-means++, Arthur and Vassilvitskii 2007); equal weights and the variance
    /// of all points.
    fn start(points: &[(f64, f64)], seed: u64, start: u32) -> Self {
        let stream = Stream::new(seed, Purpose::Init, 2, start);
        let total: f64 = points.iter().map(|p| p.1).sum();
        let mean = points.iter().map(|(x, w)| w * x).sum::<f64>() / total;
        let spread = points
            .iter()
            .map(|(x, w)| w * (x - mean).powi(2))
            .sum::<f64>()
            / total;
        let sd = spread.max(LEAST_VARIANCE).sqrt();
        let mut components: Vec<Component> = Vec::new();
        for draw in 0..COMPONENTS as u64 {
            let chance = |&(x, w): &(f64, f64)| {
                let distances = components.iter().map(|c| (x - c.mean).powi(2));
                w * distances
                    .fold(None, |least: Option<f64>, d| {
                        Some(least.map_or(d, |l| l.min(d)))
                    })
                    .unwrap_or(1.0)
            };
            let sum: f64 = points.iter().map(chance).sum();
            let mut left = f64::from(stream.uniform(draw)) * sum;
            let drawn = points.iter().filter(|p| chance(p) > 0.0).find(|p| {
                left -= chance(p);
                left < 0.0
            });
            // Rounding can leave a little of the draw over: then it is the last that it can be.
            let last = || points.iter().rev().find(|p| chance(p) > 0.0);
            let mean = drawn.or_else(last).map_or(mean, |p| p.0);
            components.push(Component {
                weight: 1.0 / COMPONENTS as f64,
                mean,
                sd,
            });
        }
        Self {
            components,
            log_likelihood: f64::NEG_INFINITY,
        }
    }

    /// Each component's part in each point; the log-likelihood.
    fn expect(&self, points: &[(f64, f64)], parts: &mut [[f64; COMPONENTS]]) -> f64 {
        let mut log_likelihood = 0.0;
        for (&(x, w), parts) in points.iter().zip(parts) {
            for (part, component) in parts.iter_mut().zip(&self.components) {
                *part = component.log_density(x);
            }
            let most = parts.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = parts.iter().map(|p| (p - most).exp()).sum();
            let log_density = most + sum.ln();
            parts.iter_mut().for_each(|p| *p = (*p - log_density).exp());
            log_likelihood += w * log_density;
        }
        log_likelihood
    }

    /// The components that suit these parts best. One that has lost all points stays as it is.
    fn maximise(&mut self, points: &[(f64, f64)], parts: &[[f64; COMPONENTS]]) {
        let total: f64 = points.iter().map(|p| p.1).sum();
        for (i, component) in self.components.iter_mut().enumerate() {
            let sum = |f: &dyn Fn(f64) -> f64| -> f64 {
                let weighted = points.iter().zip(parts);
                weighted.map(|(&(x, w), parts)| w * parts[i] * f(x)).sum()
            };
            let weight = sum(&|_| 1.0);
            if weight <= f64::MIN_POSITIVE * total {
                continue;
            }
            let mean = sum(&|x| x) / weight;
            let variance = sum(&|x| (x - mean).powi(2)) / weight;
            *component = Component {
                weight: weight / total,
                mean,
                sd: variance.max(LEAST_VARIANCE).sqrt(),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(counts: &[(u32, u32)]) -> Vec<(f64, f64)> {
        counts.iter().map(|&(x, n)| (x.into(), n.into())).collect()
    }

    /// scikit-learn's `GaussianMixture(3, tol=1e-12, reg_covar=0)`, the best of 50 seeds, on the
    /// layers repeated as often as they count.
    #[test]
    fn the_fit_is_that_of_scikit_learn() {
        let counts = [
            (0, 3),
            (1, 9),
            (2, 14),
            (3, 8),
            (4, 4),
            (8, 6),
            (9, 15),
            (10, 22),
            (11, 17),
            (12, 5),
            (18, 2),
            (19, 7),
            (20, 11),
            (21, 19),
            (22, 13),
            (23, 4),
        ];
        let want = [
            (0.2389936988, 2.0263162697, 1.0878981876),
            (0.4088050433, 9.9999994877, 1.0813114656),
            (0.3522012579, 20.8214285714, 1.2263060511),
        ];
        let mixture = Mixture::fit(&points(&counts), 1).unwrap();
        assert!((mixture.log_likelihood + 416.290_784_622).abs() < 1e-6);
        for (got, (weight, mean, sd)) in mixture.components.iter().zip(want) {
            let near = |got: f64, want: f64| (got - want).abs() < 1e-4;
            assert!(
                near(got.weight, weight) && near(got.mean, mean) && near(got.sd, sd),
                "{got:?}"
            );
        }
        assert_eq!(mixture, Mixture::fit(&points(&counts), 1).unwrap());
    }

    #[test]
    fn three_layers_are_three_components_of_the_least_width() {
        let mixture = Mixture::fit(&points(&[(2, 5), (12, 10), (27, 5), (3, 0)]), 7).unwrap();
        for (c, (mean, weight)) in
            mixture
                .components
                .iter()
                .zip([(2.0, 0.25), (12.0, 0.5), (27.0, 0.25)])
        {
            assert!(
                (c.mean - mean).abs() < 1e-9 && (c.weight - weight).abs() < 1e-9,
                "{c:?}"
            );
            assert!((c.sd - LEAST_VARIANCE.sqrt()).abs() < 1e-12);
        }
        let area: f64 = (0..4000)
            .map(|i| mixture.density(f64::from(i) / 100.0) / 100.0)
            .sum();
        assert!((area - 1.0).abs() < 1e-3, "{area}");
    }

    #[test]
    fn fewer_layers_than_components_have_no_fit() {
        assert_eq!(Mixture::fit(&points(&[(1, 4), (2, 5), (9, 0)]), 0), None);
    }
}
