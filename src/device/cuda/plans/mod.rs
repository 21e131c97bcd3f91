//! How a GPU computes convolutions and products is chosen once and kept: as a checkpoint or another rank has chosen, else as was found on this
//! machine before, else as a search finds now.

mod cache;
mod table;

pub use table::{Card, Choice, Piece, PlanTable, TimedChoice};

use super::blas::{Blas, ProductChoice};
use super::dnn::{ConvolutionPlan, Dnn};
use super::{AlignedProduct, ConvolutionShape, CudaError, Gpu};
use crate::files::Durability;
use cache::PlanCache;
use std::collections::VecDeque;
use std::time::Duration;

/// What plans are searched with.
pub(super) struct Libraries<'a> {
    pub gpu: &'a mut Gpu,
    pub dnn: &'a Dnn,
    pub blas: &'a Blas,
}

/// A plan, ready to be bound to addresses.
#[derive(Debug)]
enum Plan {
    Convolution(ConvolutionPlan),
    Product(ProductChoice, Duration),
}

impl Plan {
    fn piece(&self) -> Piece {
        match self {
            Plan::Convolution(plan) => Piece::Convolution(plan.choice().shape),
            Plan::Product(choice, _) => Piece::Product(choice.product),
        }
    }

    /// What it was chosen for.
    fn timed(&self) -> TimedChoice {
        let (choice, time) = match self {
            Plan::Convolution(plan) => (Choice::Convolution(plan.choice().clone()), plan.time().unwrap_or_default()),
            Plan::Product(choice, time) => (Choice::Product(choice.clone()), *time),
        };
        TimedChoice { choice, nanoseconds: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) }
    }
}

/// The plans of a GPU.
#[derive(Debug)]
pub(super) struct Plans {
    cache: PlanCache,
    /// Chosen before or elsewhere.
    known: PlanTable,
    /// Those that this process computes with, one for each piece.
    ready: Vec<Plan>,
    /// Most bytes of workspace that one may need.
    limit: usize,
    notices: VecDeque<String>,
}

/// What became of pieces that needed plans.
struct Finding {
    /// Found by a search.
    new: PlanTable,
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

    /// Takes the choices of a table before its own, for pieces that have no plan yet; not those for another card.
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
        self.ready.iter().map(Plan::timed).for_each(|timed| table.put(timed));
        table
    }

    /// How many of the pieces have to be searched for.
    pub fn unknown(&self, pieces: &[Piece]) -> usize {
        pieces.iter().filter(|piece| self.get(piece).is_none() && self.known.get(piece).is_none()).count()
    }

    fn get(&self, piece: &Piece) -> Option<&Plan> {
        self.ready.iter().find(|plan| plan.piece() == *piece)
    }

    /// The plan of a convolution that has one.
    pub fn convolution(&self, shape: &ConvolutionShape) -> Option<&ConvolutionPlan> {
        match self.get(&Piece::Convolution(*shape)) {
            Some(Plan::Convolution(plan)) => Some(plan),
            _ => None,
        }
    }

    /// The algorithm of a product that has one.
    pub fn product(&self, product: &AlignedProduct) -> Option<&ProductChoice> {
        match self.get(&Piece::Product(*product)) {
            Some(Plan::Product(choice, _)) => Some(choice),
            _ => None,
        }
    }

    /// Has a plan for each piece, and keeps those that are new for other processes. Gives false if it left off, as `goes_on` said.
    ///
    /// # Errors
    /// There is none for one of them, too little memory, or the GPU or a library fails.
    pub fn find(
        &mut self,
        libraries: &mut Libraries<'_>,
        pieces: &[Piece],
        goes_on: &dyn Fn() -> bool,
    ) -> Result<bool, CudaError> {
        let mut finding = Finding { new: PlanTable::new(self.card().clone()), refusals: Vec::new() };
        let mut find = || {
            for piece in pieces {
                if !goes_on() {
                    return Ok(false);
                }
                if self.get(piece).is_none() {
                    let before = finding.new.choices().len();
                    let plan = self.plan(libraries, piece, &mut finding)?;
                    self.ready.push(plan);
                    if finding.new.choices().len() > before {
                        // A search of minutes may be killed.
                        self.keep(&finding.new, Durability::Kill);
                    }
                }
            }
            Ok(true)
        };
        let found = find();
        if !finding.new.choices().is_empty() {
            self.keep(&finding.new, Durability::PowerFailure);
        }
        self.tell_of(&finding.refusals);
        found
    }

    fn plan(&self, libraries: &mut Libraries<'_>, piece: &Piece, finding: &mut Finding) -> Result<Plan, CudaError> {
        if let Some(known) = self.known.get(piece) {
            match self.again(libraries, known)? {
                Ok(plan) => return Ok(plan),
                Err(why) => finding.refusals.push(why),
            }
        }
        let Libraries { gpu, dnn, blas } = libraries;
        let plan = match piece {
            Piece::Convolution(shape) => Plan::Convolution(dnn.search(gpu, shape, self.limit)?),
            Piece::Product(product) => {
                let (choice, time) = blas.search(gpu, product)?;
                Plan::Product(choice, time)
            }
        };
        finding.new.put(plan.timed());
        Ok(plan)
    }

    /// The plan of a choice, or why it cannot be used.
    fn again(&self, libraries: &Libraries<'_>, known: &TimedChoice) -> Result<Result<Plan, String>, CudaError> {
        let (Libraries { gpu, dnn, blas }, time) = (libraries, Duration::from_nanos(known.nanoseconds));
        let choice = match &known.choice {
            Choice::Convolution(choice) => choice,
            Choice::Product(choice) => {
                let fault = blas.fault_of(gpu, choice)?;
                let about = |why| format!("{}: {why}", choice.product.shape);
                return Ok(fault.map_or(Ok(Plan::Product(choice.clone(), time)), |why| Err(about(why))));
            }
        };
        let plan = match dnn.plan_from_choice(choice) {
            Ok(plan) => plan.timed(time),
            Err(error @ (CudaError::NoPlan { .. } | CudaError::Library { .. })) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        let about = |why: String| format!("engine {} for the {}: {why}", choice.engine.engine, choice.shape);
        if plan.workspace() > self.limit {
            return Ok(Err(about(format!("it needs {} bytes of workspace", plan.workspace()))));
        }
        Ok(dnn.fault_of(gpu, &plan)?.map_or(Ok(Plan::Convolution(plan)), |why| Err(about(why))))
    }

    fn keep(&mut self, found: &PlanTable, durability: Durability) {
        let notice = self.cache.add(found, durability);
        // What stands in the way is the same for each plan.
        self.notices.extend(notice.filter(|notice| !self.notices.contains(notice)));
    }

    fn tell_of(&mut self, refusals: &[String]) {
        let Some(first) = refusals.first() else { return };
        self.notices.push_back(format!(
            "{} of the plans that were chosen before cannot be used any more, and others were searched, which may give other last bits: \
             {first}",
            refusals.len()
        ));
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
