//! FLOP a token of the 1.5B recipe, counted by the code that plans runs, beside the figures that
//! the engine was designed with.

use std::fmt;

use serde::Serialize;

use super::shapes::models;
use crate::error::{Error, Result};
use crate::train::TrainConfig;
use crate::train::flop::{self, FlopPart};

/// The comparison. What the design's figures leave out (attention, adapters, active latents) is
/// listed without one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CostModel {
    /// One for each part of a stage.
    pub lines: Vec<CostLine>,
}

/// One part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CostLine {
    /// What is computed.
    pub what: String,
    /// FLOP a token, counted.
    pub counted: f64,
    /// The design's figure in GFLOP a token, to one decimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub designed_gflop: Option<f64>,
}

impl CostModel {
    /// Counts for layer 12 of Qwen2 1.5B, 65 536 latents, sequences of 2048 tokens, rank 32.
    ///
    /// # Errors
    /// None for these sizes; the planner's, in principle.
    pub fn count() -> Result<Self> {
        let [.., model] = models();
        let config = TrainConfig {
            hookpoints: vec![12],
            latents: Some(model.latents),
            ..TrainConfig::default()
        };
        let one = flop::sae_stage(&config, &model.config)?;
        let two = flop::sft_stage(&config, &model.config)?;
        let lines = TABLE.iter().map(|entry| {
            let parts = if entry.stage == STAGE_ONE { &one } else { &two };
            entry.count(parts)
        });
        Ok(Self {
            lines: lines.collect::<Result<_>>()?,
        })
    }
}

/// A line of the comparison: parts of a stage, and the design's figure for all of them.
struct Entry {
    stage: &'static str,
    parts: &'static [&'static str],
    designed_gflop: Option<f64>,
}

const STAGE_ONE: &str = "Stage I";
const FIRST: &str = "Stage II, first epoch";
const LATER: &str = "Stage II, later epochs";

const PREFIX: &str = "layers up to the hookpoint";
const ENCODER: &str = "SAE encoder";
const TEACHER: &str = "layers after it, teacher";
const STUDENT: &str = "layers of the student";
const HEADS: &str = "heads of teacher and student";
const BACKWARD: &str = "backward of layers and head";
/// All products with weights in Stage II.
const PRODUCTS: &[&str] = &[PREFIX, ENCODER, TEACHER, STUDENT, HEADS, BACKWARD];
const ATTENTION: &[&str] = &["attention of the teacher", "attention of the student"];

#[rustfmt::skip] // One row a line.
const TABLE: &[Entry] = &[
    Entry { stage: STAGE_ONE, parts: &[PREFIX], designed_gflop: Some(1.2) },
    Entry { stage: STAGE_ONE, parts: &[ENCODER], designed_gflop: Some(0.2) },
    Entry { stage: STAGE_ONE, parts: &["attention"], designed_gflop: None },
    Entry { stage: STAGE_ONE, parts: &["SAE, active latents"], designed_gflop: None },
    Entry { stage: FIRST, parts: &[PREFIX], designed_gflop: Some(1.2) },
    Entry { stage: FIRST, parts: &[ENCODER], designed_gflop: Some(0.2) },
    Entry { stage: FIRST, parts: &[TEACHER, STUDENT], designed_gflop: Some(2.8) },
    Entry { stage: FIRST, parts: &[HEADS], designed_gflop: Some(0.9) },
    Entry { stage: FIRST, parts: &[BACKWARD], designed_gflop: Some(1.9) },
    Entry { stage: FIRST, parts: PRODUCTS, designed_gflop: Some(7.0) },
    Entry { stage: FIRST, parts: ATTENTION, designed_gflop: None },
    Entry { stage: FIRST, parts: &["adapters"], designed_gflop: None },
    Entry { stage: LATER, parts: PRODUCTS, designed_gflop: Some(4.2) },
    Entry { stage: LATER, parts: ATTENTION, designed_gflop: None },
];

impl Entry {
    fn count(&self, parts: &[FlopPart]) -> Result<CostLine> {
        let mut counted = 0.0;
        for &name in self.parts {
            let part = parts.iter().find(|part| part.what == name);
            let part = part.ok_or_else(|| Error::operand("bench-kernels", name, "no such part"))?;
            counted += match self.stage {
                LATER => part.later,
                _ => part.first,
            };
        }
        let what = match self.parts {
            [one] => (*one).to_owned(),
            [one, two] => format!("{one} and {two}"),
            _ => "all products with weights".to_owned(),
        };
        Ok(CostLine {
            what: format!("{}: {what}", self.stage),
            counted,
            designed_gflop: self.designed_gflop,
        })
    }
}

impl fmt::Display for CostModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "GFLOP a token at 1.5B: counted, and as designed for")?;
        for line in &self.lines {
            write!(f, "  {:<88} {:6.2}", line.what, line.counted / 1e9)?;
            match line.designed_gflop {
                Some(designed) => writeln!(f, "   {designed:.1}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_agree_with_the_design_to_its_rounding() {
        let model = CostModel::count().unwrap();
        let mut compared = 0;
        for line in &model.lines {
            if let Some(designed) = line.designed_gflop {
                let counted = (line.counted / 1e8).round() / 10.0;
                assert_eq!(counted, designed, "{}", line.what);
                compared += 1;
            }
        }
        assert_eq!(compared, 9);
    }

    #[test]
    fn what_the_design_leaves_out_is_as_counted_by_hand() {
        let model = CostModel::count().unwrap();
        let counted = |what: &str| {
            let line = model.lines.iter().find(|line| line.what == what);
            line.unwrap_or_else(|| panic!("no {what}")).counted
        };
        // Two products over 1024 keys on average, 12 heads of 128, 13 layers.
        let attention = 13.0 * 2.0 * 2.0 * 1024.0 * 1536.0;
        assert_eq!(counted("Stage I: attention"), attention);
        // Rank 32 on q, k, v, o, gate, up, down of 15 layers, forward and twice that backward.
        let ends = 2.0 * 3072.0 + 2.0 * 1792.0 + 3.0 * 10_496.0;
        let adapters = 15.0 * 3.0 * 2.0 * 32.0 * ends;
        assert_eq!(counted("Stage II, first epoch: adapters"), adapters);
    }
}
