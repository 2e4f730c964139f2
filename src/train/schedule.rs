use crate::data::order;

/// Steps of a stage: each epoch takes all rows once, in steps of equal size, the last of an epoch
/// with what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Rows (sequences) of an epoch.
    pub rows: u64,
    /// Rows of a step, those of all its micro-batches together.
    pub per_step: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// `epochs` times `rows` rows in steps of `per_step`, but at most `max_steps` steps.
    pub fn new(rows: u64, per_step: usize, epochs: usize, max_steps: Option<usize>) -> Self {
        let per_step = per_step.max(1) as u64;
        let steps_per_epoch = rows.div_ceil(per_step);
        let all = steps_per_epoch.saturating_mul(epochs as u64);
        Self {
            rows,
            per_step,
            steps_per_epoch,
            steps: max_steps.map_or(all, |max| all.min(max as u64)),
        }
    }

    /// Whether any row is used twice.
    pub fn repeats(&self) -> bool {
        self.steps > self.steps_per_epoch
    }

    /// Rows of the first `steps` steps.
    pub fn rows_until(&self, steps: u64) -> u64 {
        let per_epoch = self.steps_per_epoch.max(1);
        let epochs = (steps / per_epoch).saturating_mul(self.rows);
        epochs.saturating_add(steps % per_epoch * self.per_step)
    }

    /// The rows of a step, given the order of its epoch.
    pub(super) fn rows_of<'a>(&self, step: u64, order: &'a [usize]) -> &'a [usize] {
        let start = step % self.steps_per_epoch.max(1) * self.per_step;
        let end = (start + self.per_step).min(order.len() as u64);
        &order[start as usize..end as usize]
    }
}

/// The rows of one step after another. The order of an epoch is drawn once.
pub(super) struct StepRows {
    schedule: Schedule,
    seed: Option<u64>,
    epoch: Option<u64>,
    order: Vec<usize>,
}

impl StepRows {
    /// Those of `schedule`, shuffled where there is a `seed`.
    pub fn new(schedule: Schedule, seed: Option<u64>) -> Self {
        Self {
            schedule,
            seed,
            epoch: None,
            order: Vec::new(),
        }
    }

    /// The rows of a step; none after the last.
    pub fn of(&mut self, step: u64) -> &[usize] {
        if step >= self.schedule.steps {
            return &[];
        }
        let epoch = step / self.schedule.steps_per_epoch;
        if self.epoch != Some(epoch) {
            self.order = order(self.schedule.rows as usize, self.seed, epoch);
            self.epoch = Some(epoch);
        }
        self.schedule.rows_of(step, &self.order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_epoch_takes_every_row_in_an_order_that_is_drawn_once() {
        let mut rows = StepRows::new(Schedule::new(5, 2, 2, Some(5)), Some(7));
        let steps: Vec<Vec<usize>> = (0..7).map(|step| rows.of(step).to_vec()).collect();
        assert_eq!(steps[..3].concat(), order(5, Some(7), 0));
        assert_eq!(steps[3..].concat(), order(5, Some(7), 1)[..4]);
        // What has been drawn is what is taken.
        rows.order.fill(9);
        assert_eq!(rows.of(4), [9, 9]);
        assert_eq!(rows.of(2), &order(5, Some(7), 0)[4..]);
    }
}
