//! How a GPU computes convolutions is chosen once and kept: as a checkpoint or another rank has chosen, else as was found on this machine
//! before, else as a search finds now.

mod cache;
mod table;

pub use table::{Card, PlanTable, TimedChoice};

use super::dnn::{ConvolutionPlan, Dnn};
use super::{ConvolutionShape, CudaError, Gpu};
use cache::PlanCache;
use std::collections::VecDeque;
use std::time::Duration;

/// The plans of a GPU.
#[derive(Debug)]
pub(super) struct Plans {
    cache: PlanCache,
    /// Chosen before or elsewhere.
    known: PlanTable,
    /// Those that this process computes with, one for each convolution.
    ready: Vec<ConvolutionPlan>,
    /// Most bytes of workspace that one may need.
    limit: usize,
    notices: VecDeque<String>,
}

/// What became of convolutions that needed plans.
#[derive(Default)]
struct Finding {
    /// Found by a search.
    new: Vec<TimedChoice>,
    /// Why others could not be used any more.
    refusals: Vec<String>,
}

impl Plans {
    /// Plans for a card, of at most `limit` bytes of workspace.
    ///
    /// # Errors
    /// `DDPM_DIST_CUDA_PLANS` is neither `off` nor an absolute path.
    pub fn of(card: Card, limit: usize) -> Result<Plans, CudaError> {
        let cache = PlanCache::of(&card)?;
        let (known, notice) = cache.read(&card);
        Ok(Plans { cache, known, ready: Vec::new(), limit, notices: notice.into_iter().collect() })
    }

    /// What plans are for.
    pub fn card(&self) -> &Card {
        &self.known.card
    }

    /// Takes the choices of a table before its own, for convolutions that have no plan yet; not those for another card.
    pub fn prefer(&mut self, table: &PlanTable) -> bool {
        let is_ours = table.card == *self.card();
        if is_ours {
            table.choices().iter().for_each(|timed| self.known.put(timed.clone()));
        }
        is_ours
    }

    /// Those that are computed with.
    pub fn in_use(&self) -> PlanTable {
        let mut table = PlanTable::new(self.card().clone());
        self.ready.iter().map(timed).for_each(|timed| table.put(timed));
        table
    }

    /// How many of the convolutions have to be searched for.
    pub fn unknown(&self, shapes: &[ConvolutionShape]) -> usize {
        shapes.iter().filter(|shape| self.get(shape).is_none() && self.known.get(shape).is_none()).count()
    }

    /// The plan of a convolution that has one.
    pub fn get(&self, shape: &ConvolutionShape) -> Option<&ConvolutionPlan> {
        self.ready.iter().find(|plan| plan.choice().shape == *shape)
    }

    /// Has a plan for each convolution, and keeps those that are new for other processes. Gives false if it left off, as `goes_on` said.
    ///
    /// # Errors
    /// There is none for one of them, too little memory, or the GPU or cuDNN fails.
    pub fn find(
        &mut self,
        gpu: &mut Gpu,
        dnn: &Dnn,
        shapes: &[ConvolutionShape],
        goes_on: &dyn Fn() -> bool,
    ) -> Result<bool, CudaError> {
        let mut finding = Finding::default();
        let mut find = || {
            for shape in shapes {
                if !goes_on() {
                    return Ok(false);
                }
                if self.get(shape).is_none() {
                    let plan = self.plan(gpu, dnn, shape, &mut finding)?;
                    self.ready.push(plan);
                }
            }
            Ok(true)
        };
        let found = find();
        // What a search that ended early has found is found.
        self.keep(finding);
        found
    }

    fn plan(
        &self,
        gpu: &mut Gpu,
        dnn: &Dnn,
        shape: &ConvolutionShape,
        finding: &mut Finding,
    ) -> Result<ConvolutionPlan, CudaError> {
        if let Some(known) = self.known.get(shape) {
            match self.again(gpu, dnn, known)? {
                Ok(plan) => return Ok(plan),
                Err(why) => finding.refusals.push(why),
            }
        }
        let plan = dnn.search(gpu, shape, self.limit)?;
        finding.new.push(timed(&plan));
        Ok(plan)
    }

    /// The plan of a choice, or why it cannot be used.
    fn again(&self, gpu: &Gpu, dnn: &Dnn, known: &TimedChoice) -> Result<Result<ConvolutionPlan, String>, CudaError> {
        let plan = match dnn.plan_from_choice(&known.choice) {
            Ok(plan) => plan.timed(Duration::from_nanos(known.nanoseconds)),
            Err(error @ (CudaError::NoPlan { .. } | CudaError::Library { .. })) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        let about =
            |why: String| format!("engine {} for the {}: {why}", known.choice.engine.engine, known.choice.shape);
        if plan.workspace() > self.limit {
            return Ok(Err(about(format!("it needs {} bytes of workspace", plan.workspace()))));
        }
        Ok(dnn.fault_of(gpu, &plan)?.map_or(Ok(plan), |why| Err(about(why))))
    }

    fn keep(&mut self, Finding { new, refusals }: Finding) {
        if let Some(first) = refusals.first() {
            self.notices.push_back(format!(
                "{} of the plans for convolutions that were chosen before cannot be used any more, and others were searched, which may \
                 give other last bits: {first}",
                refusals.len()
            ));
        }
        if !new.is_empty() {
            let mut found = PlanTable::new(self.card().clone());
            new.into_iter().for_each(|timed| found.put(timed));
            self.notices.extend(self.cache.add(&found));
        }
    }

    /// Has the user told something.
    pub fn notify(&mut self, notice: String) {
        self.notices.push_back(notice);
    }

    /// What the user should know and has not been told.
    pub fn take_notice(&mut self) -> Option<String> {
        self.notices.pop_front()
    }
}

/// What a plan was chosen for.
fn timed(plan: &ConvolutionPlan) -> TimedChoice {
    let nanoseconds = plan.time().map_or(0, |time| time.as_nanos() as u64);
    TimedChoice { choice: plan.choice().clone(), nanoseconds }
}
