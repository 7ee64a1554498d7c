// The interface between the parts of the machine.
#pragma once

#include <deque>

#include "global.h"
#include "machine.h"
#include "shared.h"

namespace emulation {

extern Shared shared;
extern Global global;

namespace core {

int thread();   // index of the running thread in its block
int threads();  // number of threads of the block
size_t slot();  // of the block that runs, among those in flight
Actor actor();

uint32_t time();                             // the clock, which counts meetings of threads
uint32_t tick();                             // advances the clock: all accesses until now come before all that follow
void learn(int thread, const Clock& clock);  // the thread's warp now knows what `clock` knows
void wait(const char* name);                 // suspends the running thread until another wakes it
void wake(int thread);
void share();       // the thread's warp now knows what its fences have made known
uint32_t random();  // from the seed of the schedule; 0 if the schedule is in order

// A state that each block in flight has for itself: the one of the block that runs.
template <class T>
class PerBlock {
 public:
  T& operator*() {
    while (states_.size() <= slot()) states_.emplace_back();
    return states_[slot()];
  }
  T* operator->() { return &**this; }

 private:
  std::deque<T> states_;
};

// The asynchronous part of a block (async.cpp).
void begin_block();
void end_block();  // fails if anything is still in flight
void begin_products();
void end_products();
void begin_registers();
void end_registers();
bool land(bool nothing_else);  // completes one copy in flight: always if no thread can run, else at random

}  // namespace core
}  // namespace emulation
