//! Statistics of repeated measurements.

use serde::{Deserialize, Serialize};

/// Where repeated times lie, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// Half of the times are below.
    pub median: f64,
    /// A fifth of the times is below.
    pub p20: f64,
    /// A fifth of the times is above.
    pub p80: f64,
    /// How many there are.
    pub repetitions: usize,
}

impl Times {
    /// Of times in any order; `None` of no times.
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let at = |share: f64| quantile(&seconds, share);
        Some(Self {
            median: at(0.5)?,
            p20: at(0.2)?,
            p80: at(0.8)?,
            repetitions: seconds.len(),
        })
    }
}

/// The quantile of sorted values, linear between neighbours (as NumPy's default).
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let below = place.floor();
    let (low, high) = (
        sorted[below as usize],
        *sorted.get(below as usize + 1).unwrap_or(sorted.last()?),
    );
    Some(low + (place - below) * (high - low))
}

/// How a measurement compares with an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Less time, beyond the noise.
    Faster,
    /// More time, beyond the noise.
    Slower,
    /// No difference beyond the noise.
    Same,
    /// Counters, not times: fewer bytes of global memory asked for.
    LessTraffic,
    /// Counters, not times: more bytes of global memory asked for.
    MoreTraffic,
    /// The earlier results lack it.
    New,
}

/// What machines differ by between two runs of the same program, as a share.
const MARGIN: f64 = 0.05;

/// Faster or slower where each median lies outside the other's p20 to p80, widened by 5 %.
pub fn verdict(old: &Times, new: &Times) -> Verdict {
    let below = |a: &Times, b: &Times| {
        a.median < b.p20 * (1.0 - MARGIN) && b.median > a.p80 * (1.0 + MARGIN)
    };
    if below(new, old) {
        Verdict::Faster
    } else if below(old, new) {
        Verdict::Slower
    } else {
        Verdict::Same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(p20: f64, median: f64, p80: f64) -> Times {
        Times {
            median,
            p20,
            p80,
            repetitions: 9,
        }
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // numpy.quantile([3, 1, 4, 1, 5, 9, 2, 6], [0.5, 0.2, 0.8])
        let found = Times::of(vec![3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]).unwrap();
        assert_eq!(found.median, 3.5);
        assert!((found.p20 - 1.4).abs() < 1e-12, "{found:?}");
        assert!((found.p80 - 5.6).abs() < 1e-12, "{found:?}");
        assert_eq!(found.repetitions, 8);
        assert_eq!(
            Times::of(vec![2.0]).unwrap(),
            Times {
                repetitions: 1,
                ..times(2.0, 2.0, 2.0)
            }
        );
        assert_eq!(Times::of(vec![]), None);
    }

    #[test]
    fn a_difference_within_the_spread_or_the_margin_is_none() {
        let old = times(0.9, 1.0, 1.1);
        assert_eq!(verdict(&old, &old), Verdict::Same);
        // Its median is outside, but the old one's is inside its wide spread.
        assert_eq!(verdict(&old, &times(0.5, 0.8, 1.3)), Verdict::Same);
        // Steady clocks, 4 % apart.
        assert_eq!(
            verdict(&times(1.0, 1.0, 1.0), &times(0.96, 0.96, 0.96)),
            Verdict::Same
        );
    }

    #[test]
    fn a_difference_beyond_both_is_faster_or_slower() {
        let (old, new) = (times(0.9, 1.0, 1.1), times(0.6, 0.7, 0.8));
        assert_eq!(verdict(&old, &new), Verdict::Faster);
        assert_eq!(verdict(&new, &old), Verdict::Slower);
    }
}
