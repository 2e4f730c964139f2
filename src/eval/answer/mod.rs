//! The final answer of a completion, and whether two answers say the same.
//!
//! Numbers are compared as exact fractions: integers, decimals, percentages, fractions, mixed
//! numbers, powers, roots that come out even, factorials, binomials. What is irrational (surds,
//! π, e, logarithms) is computed in float64 and equal where it agrees to [`TOLERANCE`]. Letters
//! in an expression are variables: two expressions are equal where they agree at three fixed
//! points (after Schwartz 1980, "Fast probabilistic algorithms for verification of polynomial
//! identities"). Tuples, intervals, sets, lists, unions, matrices and equations are compared part
//! by part; what is none of these, as text.

mod compare;
mod evaluate;
mod extract;
mod normalise;
mod parse;
mod structure;
mod units;

pub use compare::equal;
pub use evaluate::TOLERANCE;
pub use extract::extract;
