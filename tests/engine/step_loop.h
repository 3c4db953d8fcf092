// StepLoop: the engine's loop without its threads, so that what runs together is the test's choice on any machine.
#ifndef CACHALOT_TESTS_ENGINE_STEP_LOOP_H_
#define CACHALOT_TESTS_ENGINE_STEP_LOOP_H_

#include <memory>
#include <string>
#include <vector>

#include "engine/model/runner.h"
#include "engine/schedule/scheduler.h"
#include "engine/step_shapes.h"
#include "tests/engine/golden.h"

namespace cachalot {

// On the CPU. Aborts the test program when the checkpoint cannot be served.
class StepLoop {
 public:
  StepLoop(const std::string& model_dir, SchedulerLimits limits, int num_blocks, int max_logits_rows = 0,
           BlockPool::PrefixCache prefix_cache = BlockPool::PrefixCache::kOn);

  void Add(const Request& request);
  // Plans and launches a step, and takes the result of the oldest when two are under way or nothing was planned; false
  // when there was nothing to do.
  bool Turn();
  // Adds all, and runs until they have ended.
  std::vector<Answer> Run(const std::vector<Request>& requests);

  const std::vector<Answer>& answers() const { return answers_; }  // in the order of Add
  EngineStats stats() const { return scheduler_->stats(); }
  BlockPool& pool() { return *pool_; }
  Runner& runner() { return *runner_; }

 private:
  void Take(Scheduler::Deltas deltas);

  ModelConfig config_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Runner> runner_;
  std::unique_ptr<StepShapes> shapes_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<Scheduler> scheduler_;
  std::vector<Answer> answers_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_ENGINE_STEP_LOOP_H_
