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
        let mut lines = Lines(Vec::new());
        lines.add(
            "Stage I",
            &one,
            &["layers up to the hookpoint"],
            Some(1.2),
            false,
        )?;
        lines.add("Stage I", &one, &["SAE encoder"], Some(0.2), false)?;
        lines.add("Stage I", &one, &["attention"], None, false)?;
        lines.add("Stage I", &one, &["SAE, active latents"], None, false)?;
        let stage = "Stage II, first epoch";
        let prefix = ["layers up to the hookpoint"];
        let suffixes = ["layers after it, teacher", "layers of the student"];
        let heads = ["heads of teacher and student"];
        let backward = ["backward of layers and head"];
        lines.add(stage, &two, &prefix, Some(1.2), false)?;
        lines.add(stage, &two, &["SAE encoder"], Some(0.2), false)?;
        lines.add(stage, &two, &suffixes, Some(2.8), false)?;
        lines.add(stage, &two, &heads, Some(0.9), false)?;
        lines.add(stage, &two, &backward, Some(1.9), false)?;
        let all = [&prefix[..], &["SAE encoder"], &suffixes, &heads, &backward].concat();
        lines.add(stage, &two, &all, Some(7.0), false)?;
        let attention = ["attention of the teacher", "attention of the student"];
        lines.add(stage, &two, &attention, None, false)?;
        lines.add(stage, &two, &["adapters"], None, false)?;
        let stage = "Stage II, later epochs";
        lines.add(stage, &two, &all, Some(4.2), true)?;
        lines.add(stage, &two, &attention, None, true)?;
        Ok(Self { lines: lines.0 })
    }
}

struct Lines(Vec<CostLine>);

impl Lines {
    /// The parts of these names together.
    fn add(
        &mut self,
        stage: &str,
        parts: &[FlopPart],
        names: &[&str],
        designed_gflop: Option<f64>,
        later: bool,
    ) -> Result<()> {
        let mut counted = 0.0;
        for &name in names {
            let part = parts.iter().find(|part| part.what == name);
            let part = part.ok_or_else(|| Error::operand("bench-kernels", name, "no such part"))?;
            counted += if later { part.later } else { part.first };
        }
        let what = match names {
            [one] => format!("{stage}: {one}"),
            [one, two] => format!("{stage}: {one} and {two}"),
            _ => format!("{stage}: all products with weights"),
        };
        self.0.push(CostLine {
            what,
            counted,
            designed_gflop,
        });
        Ok(())
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
