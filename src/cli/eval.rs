//! `eval`: how good a model is.

use super::Failure;
use super::args::EvalArgs;

pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    Err(super::not_built(&format!("eval of {}", args.model)))
}
